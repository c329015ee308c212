"""From prompts to files: prompts, settings, device, resumable generation, sidecars, media."""
