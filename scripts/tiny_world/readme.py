"""The short README beside the asset, made from what was measured."""

from pathlib import Path
from typing import Any

README_FILE = "README.md"
_HEAD = """# A trained tiny Wan

A T2V-A14B with one expert, a few blocks deep, trained on coloured shapes (docs/tiny_world.md).

Provenance: {provenance}.

`python scripts/make_tiny_wan.py --trained --out DIR` turns it into a checkpoint in the official layout.

| file | holds |
| --- | --- |
| `dit.safetensors`, `config.json` | the DiT, official names, bfloat16 |
| `text_encoder.safetensors` | the UMT5 encoder, official names, bfloat16 |
| `vae.safetensors` | the VAE of the Wan 2.1 kind, official names, bfloat16 |
| `quality.json` | what was measured, how, and the files' SHA-256 |

Drawn with {steps} Euler steps, shift {shift:g}, guidance {guidance:g} against the empty caption; templates that
training never saw; read by the checker. A picture is right when both colour and shape are; the checker
calls a shape only what fits well. "Nearest" asks for the colour and the shape that fits best, however badly it is drawn.

| templates | both right | colour | shape | nearest | n |
| --- | --- | --- | --- | --- | --- |
"""


def write_readme(directory: Path, quality: dict[str, Any]) -> None:
    """Write README.md; `quality` is what `quality.json` holds."""
    rows = [
        f"| {name} | {shares['both_right']:.1%} | {shares['colour_right']:.1%} | {shares['shape_right']:.1%} "
        f"| {shares['nearest_right']:.1%} | {shares['n']} |"
        for name, shares in quality["results"].items()
    ]
    head = _HEAD.format(provenance=quality["provenance"], **quality["drawing"])
    (directory / README_FILE).write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
