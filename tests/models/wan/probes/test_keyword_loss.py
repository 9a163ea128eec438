"""The loss with a keyword alone, against the layers of training in a row, encoder included."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch

from models.wan.arch import VARIANTS, load_arch
from models.wan.checkpoint import open_text_encoder, open_transformer
from models.wan.datasets import MEMO_FILE
from models.wan.evaluation import WanEvalBatches
from models.wan.layers import Workload, dit_layers, text_layers
from models.wan.probes.encoder_prompts import Entry
from models.wan.probes.encoder_stream import open_encoder_pair, stream_states
from models.wan.probes.keyword_loss import keyword_losses, open_samples, samples_holding
from models.wan.stages import TextWire
from models.wan.text_encoder import WanTokenizer, pad_token_ids
from tests.helpers.workspace import make_workspace
from utils.data.cache import CacheStore
from utils.data.sampler import MicroBatch, Visit
from utils.errors import UserError
from utils.flow_matching import per_sample_loss

CPU = torch.device("cpu")
KEYWORDS = [
    Entry("keyword", number, word, word) for number, word in enumerate(("circle", "hexagon", "square"), 1)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_ti2v, tiny_dataset):
    workspace = make_workspace(tmp_path_factory.mktemp("run"), tiny_ti2v, tiny_dataset)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = workspace.train("encoder_ft", "max_steps=2", "optimizer.lr=1e-2")
    assert code == 0, said.getvalue()
    return workspace


@pytest.fixture(scope="module")
def measured(run, tiny_ti2v):
    """The samples, both encoders' states of the keywords, and the records."""
    data = open_samples(run.run() / "config.toml", 3)
    tuned = sorted(run.run().glob("*/text_encoder.safetensors"))[-1]
    ids = [WanTokenizer(data.paths.tokenizer_dir)(entry.text) for entry in KEYWORDS]
    pair = open_encoder_pair(data.paths.text_encoder, tuned)
    base, tuned_states = stream_states(pair, ids, torch.float32, CPU, lambda layer: None)
    place = {entry.text: index for index, entry in enumerate(KEYWORDS)}
    records = keyword_losses(data, KEYWORDS, place, base, tuned_states, 2, CPU)
    return data, tuned, place, (base, tuned_states), records


def by_training_layers(data, encoder, entry, index):
    """The same loss through every layer that a run with this encoder has, from token ids on."""
    config = replace(data.config, uncond_fraction=0.0)
    workload = Workload(1.0, 1.0)
    source = open_transformer(data.paths.transformer_dir)
    arch = load_arch(data.paths.config_json, source.shapes)
    specs = text_layers(config, open_text_encoder(encoder), workload)
    specs += dit_layers(config, source, arch, (), {}, workload)
    visits = tuple(Visit(index, quantile) for quantile in range(5))
    batch = MicroBatch(visits, data.samples[index].bucket, epoch=0)
    prepared = data.batches.prepare(batch, 1.0, need_inputs=True, need_labels=True)
    ids_BL, lens_B = pad_token_ids([WanTokenizer(data.paths.tokenizer_dir)(entry.text)] * 5)
    wire = TextWire(*prepared.inputs)._replace(text=ids_BL, lens_B=lens_B)
    with torch.no_grad():
        for spec in specs:
            wire = spec.build(CPU)(wire)
    return float(per_sample_loss(wire, prepared.labels[0], *prepared.labels[4:]).mean())


def test_the_loss_is_that_of_the_layers_of_training(measured):
    data, tuned, _, _, records = measured
    assert [record.entry.text for record in records] == ["circle", "square"]  # no caption holds a hexagon
    for record in records:
        indices = samples_holding(data, record.entry.text, 2)
        assert record.num_samples == len(indices) >= 1
        assert all(record.entry.text in data.samples[index].captions[0] for index in indices)
        for encoder, found in ((data.paths.text_encoder, record.base), (tuned, record.tuned)):
            expected = [by_training_layers(data, encoder, record.entry, index) for index in indices]
            assert found == pytest.approx(sum(expected) / len(expected), rel=1e-6)
        assert record.change.mean == pytest.approx(record.tuned - record.base, abs=1e-9)
        assert abs(record.change.mean) > 1e-6


def test_the_loss_of_an_image_conditioned_run_leaves_the_first_frame_out(measured):
    data, tuned, place, states, _ = measured
    batches = WanEvalBatches(
        replace(data.config, model=replace(data.config.model, first_frame_prob=1.0)),
        VARIANTS["ti2v-5b"],
        data.samples,
        data.batches._cache,
        data.paths.tokenizer_dir,
        data.config.eval_quantiles,
    )
    clean = replace(data, batches=batches)
    records = keyword_losses(clean, KEYWORDS, place, *states, 9, CPU)
    for record in records:
        indices = samples_holding(clean, record.entry.text, 9)
        expected = [by_training_layers(clean, tuned, record.entry, index) for index in indices]
        assert record.tuned == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert any(data.samples[index].bucket.num_frames > 1 for index in samples_holding(clean, "circle", 9))
    assert records[0].tuned != keyword_losses(data, KEYWORDS, place, *states, 9, CPU)[0].tuned


def test_one_encoder_on_both_sides_differs_by_nothing(measured):
    data, _, place, (base, _), _ = measured
    for record in keyword_losses(data, KEYWORDS, place, base, base, 1, CPU):
        assert record.change.mean == 0.0 and record.base == record.tuned
        assert record.change.low is None  # one sample has no interval


def test_keywords_are_whole_words(measured):
    data = measured[0]
    assert (
        samples_holding(data, "circl", 9) == []
        and samples_holding(data, "CIRCLE", 9) == samples_holding(data, "circle", 9) != []
    )
    assert samples_holding(data, "dark  background", 9) == samples_holding(data, "dark background", 9) != []


def test_samples_that_are_not_in_the_cache_are_left_out(run, tmp_path):
    text = (run.run() / "config.toml").read_text()
    dataset = (run.root / "dataset.toml").read_text().replace(str(run.cache), str(tmp_path / "cache"))
    (tmp_path / "dataset.toml").write_text(dataset)
    (tmp_path / "config.toml").write_text(
        text.replace(str(run.root / "dataset.toml"), str(tmp_path / "dataset.toml"))
    )
    CacheStore(tmp_path / "cache")
    with pytest.raises(UserError, match="item.s. of this run are missing in the cache"):
        open_samples(tmp_path / "config.toml", 0)


def test_what_is_found_out_about_files_is_not_written_down(run, tmp_path):
    memo = run.cache / MEMO_FILE
    memo.rename(tmp_path / "memo")
    try:
        assert open_samples(run.run() / "config.toml", 0).samples
        assert not memo.exists()
    finally:
        (tmp_path / "memo").rename(memo)
