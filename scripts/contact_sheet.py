"""Puts pictures that `t2i-experts generate` made side by side, each above its prompt, for looking at many at once.

t2i-experts generate --prompts scripts/eval_prompts.txt --out pictures/eval
python scripts/contact_sheet.py pictures/eval sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from t2i_experts.cascade.picture import read_metadata
from t2i_experts.charts import draw_captioned


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
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append((image.convert("RGB"), (read_metadata(path) or {}).get("prompt", path.stem)))
    draw_captioned(pictures, arguments.columns, arguments.side, lines=3).save(arguments.sheet)


if __name__ == "__main__":
    main()
