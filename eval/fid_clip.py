"""Compute FID and CLIP score of a folder of images or clips, or of a prompts file that a model samples first.

python eval/fid_clip.py samples/ --reference coco/ --inception weights-inception-2015-12-05-6726825d.pth \\
    --clip openai/clip-vit-large-patch14 --prompts captions.jsonl
python eval/fid_clip.py eval/demo_images.jsonl --model tiny-sd3 --output-dir samples/ \\
    --reference dense/

Without --inception the distance is fd_tiny, of the shipped extractor, which knows the demo's pictures only.
Without --clip there is no CLIP score, without --reference no distance.
"""

import sys

import tyro

from dit_accel.bench.fid_clip import FidClip

if __name__ == "__main__":
    try:
        tyro.cli(FidClip, description=__doc__).run()
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
