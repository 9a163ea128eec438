"""From one LoRA file to another: read under any names, write under those of one program, read again and compared."""

from pathlib import Path
from tempfile import TemporaryDirectory

from models.wan.arch import PUBLISHED, expected_shapes
from models.wan.lora_dialects import PEFT_CONFIG_NAME, Dialect, DialectFile, folded, to_dialect
from models.wan.names import dit_to_diffusers
from utils.adapter_runs import ADAPTER_NAME
from utils.errors import UserError
from utils.files import atomic_directory, atomic_path, disk_errors_as_user_errors
from utils.lora_names import AdapterFile, kohya_aliases, read_adapter
from utils.report import refuse_training_run


def read_wan_adapter(path: Path) -> AdapterFile:
    """Read a LoRA for Wan 2.2 under any names that are known, its modules by official path, without looking at a base.

    Raises:
        UserError: as `utils.lora_names.read_adapter`, or a module that no Wan 2.2 model has.
    """
    modules = _modules()
    adapter = read_adapter(
        path, {dit_to_diffusers(module): module for module in modules} | kohya_aliases(modules)
    )
    foreign = [module for module in adapter.modules if module not in modules]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UserError(
            f"{adapter.path}: {foreign[0]}{more} is no linear layer of Wan 2.2; this is for adapters of its DiT"
        )
    return adapter


def convert_lora(source: Path, dialect: Dialect, target: Path) -> list[str]:
    """Write the adapter of `source` under the names of `dialect` to `target`; returns what to tell people.

    Raises:
        UserError: the adapter cannot be read, or not be written in this dialect, or `target` is there already.
    """
    adapter = read_wan_adapter(source)
    if target.exists():
        raise UserError(f"{target}: exists already and is not overwritten; give another --out")
    refuse_training_run(target, "--out")
    if dialect != "peft" and target.suffix != ".safetensors":
        raise UserError(f"{target}: the file to write must end in .safetensors; mend --out")
    written = to_dialect(adapter.modules, dialect)
    with disk_errors_as_user_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Compared before it has its name: what is found under that is right.
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
            made = Path(staging) / "adapter"
            _write(made, written, adapter.metadata)
            _check_equal(adapter, read_wan_adapter(made))
            if written.peft_config is None:
                with atomic_path(target) as temporary:
                    (made / ADAPTER_NAME).replace(temporary)
            else:
                with atomic_directory(target) as temporary:
                    for path in made.iterdir():
                        path.replace(temporary / path.name)
    ranks = sorted({pair.rank for pair in adapter.modules.values()})
    scales = sorted({pair.scale for pair in adapter.modules.values()})
    lines = [
        f"{target}: {len(adapter.modules)} modules, rank {', '.join(map(str, ranks))}, as {dialect} names them"
    ]
    if scales != [1.0]:
        lines.append(
            f"scale {', '.join(f'{scale:g}' for scale in scales)} is folded into B; alpha is the rank now"
        )
    return lines


def _write(directory: Path, written: DialectFile, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    directory.mkdir()
    save_file(written.tensors, directory / ADAPTER_NAME, metadata=metadata or None)
    if written.peft_config is not None:
        (directory / PEFT_CONFIG_NAME).write_text(written.peft_config, encoding="utf-8")


def _check_equal(before: AdapterFile, after: AdapterFile) -> None:
    """What was written does what was read; everything else would be an error of this program."""
    import torch

    if list(before.modules) != list(after.modules) and set(before.modules) != set(after.modules):
        raise RuntimeError(f"{after.path} holds other modules than {before.path}")
    for module, pair in before.modules.items():
        wanted, found = folded(pair), folded(after.modules[module])
        if not all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True)):
            raise RuntimeError(f"{after.path}: {module} differs from {before.path}")


def _modules() -> set[str]:
    """The linear layers of all published models."""
    names: set[str] = set()
    for arch in PUBLISHED.values():
        names |= {
            name.removesuffix(".weight")
            for name, shape in expected_shapes(arch).items()
            if name.endswith(".weight") and len(shape) >= 2
        }
    return names
