"""The closed-form translator on the tiny world: what it is solved from, none of which is drawn, and the call."""

import contextlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from scripts import solve_translator
from scripts.tiny_world.captions import COLOUR_ONLY, GENERAL, SHAPE_ONLY, TRAINING, fill
from scripts.tiny_world.proof_data import SEEN, THINGS
from scripts.tiny_world.world import COLOURS, GROUNDS, SHAPES
from utils.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, UserError
from utils.files import atomic_write_text

# Without the bare name, which is drawn.
TEMPLATES = tuple(template for template in TRAINING if template != "{thing}{motion}")


def neutral_texts() -> tuple[str, ...]:
    """Known words in the templates of training, and captions that say less."""
    return tuple(
        dict.fromkeys(
            fill(template, colour, shape, ground, None)
            for template in (*TEMPLATES, *COLOUR_ONLY, *SHAPE_ONLY, *GENERAL)
            for colour in COLOURS
            for shape in SHAPES
            for ground in GROUNDS
        )
    )


def domain_texts() -> tuple[str, ...]:
    """New words in the templates of training: things as a whole, and combinations that the encoder was tuned on."""
    things = [
        fill(template.replace("{thing}", word), "", "", ground, None)
        for template in TEMPLATES
        if "{thing}" in template
        for word in THINGS
        for ground in GROUNDS
    ]
    pairs = [
        fill(template, *pair, ground, None) for template in TEMPLATES for pair in SEEN for ground in GROUNDS
    ]
    return tuple(dict.fromkeys(things + pairs))


def solve(work: Path, config: Path, name: str, out: Path, flags: Sequence[str]) -> None:
    """Write the adapters of both experts to `out`, which is not there, and a report of this name below `work`.

    Raises:
        UserError: solving failed, with what it said.
    """
    texts = {"neutral": neutral_texts(), "domain": domain_texts()}
    files = {kind: work / f"closed_form_{kind}.txt" for kind in texts}
    for kind, lines in texts.items():
        atomic_write_text(files[kind], "\n".join(lines) + "\n")
    given = {
        "--config": config,
        "--out": out,
        "--prompts": files["neutral"],
        "--domain_prompts": files["domain"],
        "--reports_dir": work / "reports",
        "--run_tag": name,
    }
    # A report whose adapters are not there is one of a call that was stopped.
    shutil.rmtree(work / "reports" / solve_translator.TOOL / name, ignore_errors=True)
    words = [str(word) for pair in given.items() for word in pair]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = solve_translator.main([*words, *flags])
    if status not in (EXIT_OK, EXIT_FAILED, EXIT_INCONCLUSIVE):
        raise UserError(f"scripts/solve_translator.py {' '.join(flags)}: {said.getvalue().strip()}")
