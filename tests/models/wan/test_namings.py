import pytest

from models.wan.names import dit_to_diffusers, umt5_to_hf
from models.wan.namings import find_naming, foreign_marks, looks_like, split_prefixes
from tests.helpers.weight_files import dit, published

DIT = list(dit("ti2v-5b"))
UMT5 = list(published("umt5_xxl_keys", "official_key"))
TABLES = {
    ("transformer", "official"): DIT,
    ("transformer", "diffusers"): [dit_to_diffusers(name) for name in DIT],
    ("text_encoder", "official"): UMT5,
    ("text_encoder", "Hugging Face"): [umt5_to_hf(name) for name in UMT5],
    ("vae", "official"): list(published("wan21_vae_keys", "official_key")),
    ("vae", "diffusers"): list(published("wan22_vae_keys", "diffusers_key")),
}


@pytest.mark.parametrize(("kind", "style"), TABLES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "vae."])
def test_every_name_of_every_naming_gets_its_official_name(kind, style, prefix):
    names = [prefix + name for name in TABLES[kind, style]]
    (group,) = split_prefixes(names).items()
    naming = find_naming(group[1], group[0])
    assert (naming.kind, naming.style, naming.prefix) == (kind, style, prefix)
    assert sorted(naming.official.values()) == sorted(names) and not naming.unknown
    if kind == "transformer":
        assert list(naming.official) == DIT


def test_strays_stay_with_the_part_and_are_unknown():
    names = [f"model.diffusion_model.{name}" for name in DIT]
    names[5] = names[5].replace("diffusion", "diffusioN")
    names[9] = "vae." + names[9]
    ((prefix, group),) = split_prefixes(names).items()
    naming = find_naming(group, prefix)
    assert (naming.kind, naming.unknown) == ("transformer", (names[5], names[9]))


def test_a_tied_token_table_is_no_stray():
    naming = find_naming([umt5_to_hf(name) for name in UMT5] + ["encoder.embed_tokens.weight"], "")
    assert naming.repeats == ("encoder.embed_tokens.weight",) and not naming.unknown


def test_one_odd_name_is_damage_and_two_are_another_model():
    odd = "blocks.0.cross_attn.k_img.weight"
    assert find_naming([*DIT, odd], "").kind == "transformer"
    assert find_naming([*DIT, odd, odd.replace("0", "1")], "").kind == "unknown"
    assert "CLIP branch" in foreign_marks([odd, odd])
    assert looks_like([]) == "it holds no tensors"
