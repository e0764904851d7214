"""Puts pictures that `t2i-experts generate` made side by side, each above its prompt, for looking at many at once.

t2i-experts generate --prompts scripts/eval_prompts.txt --out pictures/eval
python scripts/contact_sheet.py pictures/eval sheet.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from t2i_experts.cascade.picture import read_metadata


def main() -> None:
    """Reads the command line and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="a folder of PNG files")
    parser.add_argument("sheet", type=Path, help="the PNG file to write")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--side", type=int, default=160, help="pixels of a picture on the sheet")
    arguments = parser.parse_args()
    paths = sorted(arguments.pictures.glob("*.png"))
    if not paths:
        raise SystemExit(f"error: no PNG files in {arguments.pictures}")
    side, caption = arguments.side, 48
    rows = -(-len(paths) // arguments.columns)
    sheet = Image.new("RGB", (arguments.columns * (side + 8), rows * (side + caption)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, path in enumerate(paths):
        left, top = i % arguments.columns * (side + 8), i // arguments.columns * (side + caption)
        with Image.open(path) as image:
            sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left, top))
        prompt = (read_metadata(path) or {}).get("prompt", path.stem)
        draw.multiline_text((left + 2, top + side + 2), textwrap.fill(prompt, 28), fill="black", font=font, spacing=1)
    sheet.save(arguments.sheet)


if __name__ == "__main__":
    main()
