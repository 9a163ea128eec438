"""Caption augmentation in training: keywords of a private file stay out of the run directory, and a change is noticed."""

import pytest

from tests.helpers.workspace import check_refused, make_workspace


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset):
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


def test_a_keyword_file_is_read_and_not_copied(workspace, capsys):
    private = workspace.root / "words.txt"
    private.write_text("circle\nsquare\ntriangle\n")
    section = (
        "model.caption_aug.enable=true",
        f"model.caption_aug.keywords_file={private}",
        "model.caption_aug.mix={ single = 0.5, short = 0.3, verbose = 0.2 }",
        "checkpoint_every_n_steps=2",
        "max_steps=2",
    )
    assert workspace.train("encoder_ft", *section) == 0
    said = capsys.readouterr()
    assert "6 of 6 captions hold a keyword" in said.out + said.err
    files = [path for path in workspace.run().rglob("*") if path.is_file()]
    assert not [path for path in files if b"triangle" in path.read_bytes()]
    private.write_text("circle\nsquare\nstar\n")
    resume = ["--resume_from_checkpoint"]
    code = workspace.train("encoder_ft", *section, "max_steps=3", flags=resume)
    check_refused(
        code,
        capsys.readouterr().err,
        "keywords: a list of keywords -> a list of keywords, with other content",
    )
    private.write_text("triangle\nsquare\ncircle\n")
    assert workspace.train("encoder_ft", *section, "max_steps=3", flags=resume) == 0


def test_a_keyword_file_that_is_missing_is_named_at_once(workspace, capsys):
    missing = workspace.root / "none.txt"
    section = ("model.caption_aug.enable=true", f"model.caption_aug.keywords_file={missing}")
    code = workspace.train("encoder_ft", *section, "model.caption_aug.trim_prob=0.5")
    check_refused(code, capsys.readouterr().err, "model.caption_aug.keywords_file", str(missing))
    assert workspace.runs() == []
