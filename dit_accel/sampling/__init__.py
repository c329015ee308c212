"""Generation of images and clips from prompts: prompts files, settings, devices, resumable runs, files.

`plan` turns prompts into samples and `batches` runs the pipeline calls. Two modules write the results: `numbered` writes
numbered files with sidecars, and `generate` writes sample sets that are named by id and can be resumed.
"""
