"""From prompts to files: prompts, settings, device, resumable generation, sidecars, media.

`plan` turns prompts into samples, `batches` makes them in pipeline calls, and two writers keep them: `numbered`
(numbered files with sidecars) and `generate` (sample sets by id, with a journal).
"""
