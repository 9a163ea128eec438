"""One of two stages that draw a job with and without keeping what is made of its texts; rank 0 writes what came out.

    torchrun --nproc_per_node 2 staged_sampling.py JOB OUT

JOB is a pickled `SampleJob` of the test; OUT gets latents and how often keys and values were made, of all ranks.
"""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.wan.attention import WanAttention
from models.wan.sample_job import Where, sample
from utils.cli import end_process
from utils.distributed import gather_objects, process_group

calls: list[WanAttention] = []
make = WanAttention.keys_and_values


def counted(self, source_BLD, table):
    calls.extend([self] if table is None else [])
    return make(self, source_BLD, table)


def main() -> int:
    WanAttention.keys_and_values = counted
    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    job = replace(job, config=replace(job.config, pipeline_stages=2))
    found = {}
    with process_group(10.0) as processes:
        for name, reuse in (("kept", True), ("plain", False)):
            calls.clear()
            settings = replace(job.settings, reuse_text_keys=reuse)
            latents = sample(replace(job, settings=settings), Where(processes.device, processes))
            found |= {f"{name}.{index}": one for index, one in enumerate(latents)}
            own = gather_objects(len(calls))
            assert min(own) > 0, "a stage has no block"
            found[f"{name}.makings"] = torch.tensor(sum(own))
        if processes.is_main:
            save_file(found, sys.argv[2])
    return 0


if __name__ == "__main__":
    end_process(main())
