"""Which probes run after which saves, from `[probes]` and `[samples]`: pointed at what, within which limits, in which order."""

import re
from dataclasses import dataclass
from pathlib import Path

from utils.config.probe_rules import SAMPLES_PROBE, TRAINING_PROBES
from utils.config.sample_rules import samples_reports_dir
from utils.config.schema import ProbesConfig, SamplesConfig, TrainConfig
from utils.run_dir import run_name

# Reads the grid of its save, where there is one.
_READS_GRID = "dit_lora_translator"
_MAX_NAME_CHARACTERS = 100
_CPU = "cpu"


@dataclass(frozen=True)
class PlannedProbe:
    """A probe that runs on saves of a run.

    Attributes:
        tool: its name.
        section: of the config that asks for it.
        every_n_epochs: it runs on those saves of an epoch whose number N divides, and on the last.
        timeout_minutes: after which it is cut off.
        reports_dir: where its report goes.
        flag: names the save.
        column: what the probe is to call the save, where its flag takes `name=path`.
        device: the value of its `--device`; None leaves the flag out. Whatever is not `cpu` sees the GPUs.
        can_stop: whether its verdict of fail ends the run.
        group: of its numbers in TensorBoard.
        picture: the file in its report that TensorBoard shows, and the name there; None for none.
    """

    tool: str
    section: str
    every_n_epochs: int
    timeout_minutes: float
    reports_dir: str
    flag: str
    column: str | None = None
    device: str | None = None
    can_stop: bool = False
    group: str = ""
    picture: tuple[str, str] | None = None

    @property
    def sees_gpus(self) -> bool:
        """Whether it may use the GPUs that the training uses."""
        return self.device not in (None, _CPU)

    def is_due(self, epoch: int, *, at_end: bool) -> bool:
        """Whether it runs on the save of this epoch."""
        return at_end or epoch % self.every_n_epochs == 0

    def words(self, save: Path) -> list[str]:
        """What of its command line says what it looks at, and where."""
        named = str(save) if self.column is None else f"{self.column}={save}"
        return [self.flag, named, *(() if self.device is None else ("--device", self.device))]


def plan_probes(config: TrainConfig) -> tuple[PlannedProbe, ...]:
    """All probes of a run, in the order in which they look at a save: the grid before the report that shows it."""
    planned = [] if config.probes is None else measuring_probes(config.probes)
    if config.samples is not None:
        names = [one.tool for one in planned]
        place = names.index(_READS_GRID) if _READS_GRID in names else len(planned)
        grid = grid_probe(
            config.samples,
            samples_reports_dir(config),
            column="encoder" if config.model.train_text_encoder else "adapter",
        )
        planned.insert(place, grid)
    return tuple(planned)


def measuring_probes(config: ProbesConfig) -> list[PlannedProbe]:
    """The probes of `[probes]`, in the order in which it names them."""
    return [
        PlannedProbe(
            tool,
            "[probes]",
            config.every_n_epochs,
            config.timeout_minutes,
            config.reports_dir,
            TRAINING_PROBES[tool].flag,
            can_stop=config.on_fail == "stop",
            group=f"probes/{tool}",
        )
        for tool in config.run
    ]


def grid_probe(config: SamplesConfig, reports_dir: str, column: str) -> PlannedProbe:
    """The probe that draws the grid of `[samples]`; what it draws, it reads from the run's config itself."""
    return PlannedProbe(
        SAMPLES_PROBE,
        "[samples]",
        config.every_n_epochs,
        config.timeout_minutes,
        reports_dir,
        "--run",
        column=column,
        device=config.device,
        group="samples",
        picture=("grid.png", "grid"),
    )


def report_tag(run_dir: Path, save: str) -> str:
    """The name of reports on a save of a run: `<run>_<save>`, such as `20300131_120000_epoch3`."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", run_name(run_dir))[-_MAX_NAME_CHARACTERS:]
    return f"{name.lstrip('.-') or 'run'}_{save}"


def repeated(tag: str, number: int) -> str:
    """The same of the report that is made as the `number`th with this name, from 1."""
    return tag if number == 1 else f"{tag}-{number}"
