"""What the tiny VAE keeps of the world: what the checker reads off pictures and clips that went through it."""

import random
from typing import Any

import numpy as np
import torch

from models.wan.pictures import to_frames
from models.wan.vae import WanVae
from scripts.tiny_world.checker import read_clip, read_picture
from scripts.tiny_world.vae_training import to_video
from scripts.tiny_world.world import NUM_FRAMES, draw_scene, render_clip

COUNT, BATCH = 96, 16
_SEED = "vae_quality"


def measure_vae(vae: WanVae) -> dict[str, Any]:
    """Shares of fresh clips read rightly after coding and decoding, by frame and as clips; statistics of the latents."""
    scenes = random.Random(_SEED)
    frames_right, clips_right, latents = np.zeros(NUM_FRAMES), 0, []
    for _ in range(COUNT // BATCH):
        batch = [draw_scene(scenes) for _ in range(BATCH)]
        latents.append(vae.encode(to_video(np.stack([render_clip(scene) for scene in batch]))))
        video = vae.decode(latents[-1])
        for scene, frames in zip(batch, map(to_frames, video), strict=True):
            read = [read_picture(frame) for frame in frames]
            frames_right += [(r.colour, r.shape) == (scene.colour, scene.shape) for r in read]
            clip = read_clip(frames)
            clips_right += (clip.colour, clip.shape, clip.motion) == (scene.colour, scene.shape, scene.motion)
    everything = torch.cat(latents)
    return {
        "n": COUNT,
        "frames_right": [round(float(share), 4) for share in frames_right / COUNT],
        "clips_right": round(clips_right / COUNT, 4),
        "latent_mean": round(float(everything.mean()), 3),
        "latent_std": round(float(everything.std()), 3),
    }
