"""Image data sets in memory: uint8 [N, C, H, W] and labels, visited in an order that can be cut anywhere."""

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor

MOST_OF_DEVICE = 0.25  # a data set takes at most this share of the device's free memory


class ImageData:
    """A data set that fits in memory, with an order of visits that is a pure function of (seed, position).

    about: what is known of it, plain JSON values: name, classes, checksums.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, seed: int = 0, about: dict[str, Any] | None = None):
        if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            raise ValueError(f"images: expected uint8 [N, C, H, W] with N >= 1, got {images.dtype} {tuple(images.shape)}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: {len(labels)} of them for {len(images)} images; give one for each")
        self.images, self.labels, self.seed, self.about = images, labels, seed, about or {}
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.labels is None else max(len(self.about.get("classes", ())), int(self.labels.max()) + 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of images and labels: a resumed run must see the same ones."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.long().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def to(self, device: str | torch.device) -> "ImageData":
        """Itself with the images on `device`, where they fit beside a network; else pinned for fast copies."""
        device = torch.device(device)
        if device.type != "cuda" or self.images.is_cuda:
            return self
        _ = self.fingerprint  # while it is cheap
        if self.images.nbytes <= MOST_OF_DEVICE * torch.cuda.mem_get_info(device)[0]:
            self.images = self.images.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def indices(self, start: int, count: int) -> Tensor:
        """Which images are visited at positions start ... start + count - 1: every epoch is a fresh permutation."""
        picked, position, end = [], start, start + count
        while position < end:
            epoch, offset = divmod(position, len(self))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
            part = self._order[offset : offset + end - position]
            picked.append(part)
            position += len(part)
        return torch.cat(picked) if picked else torch.empty(0, dtype=torch.int64)

    def batch(self, start: int, count: int, device: str | torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """float32 images in [-1, 1] and int64 labels at these positions, on `device`.

        Images travel as bytes and become floats where they are used.
        """
        device = self.images.device if device is None else torch.device(device)
        i = self.indices(start, count).to(self.images.device)
        x = self.images[i].to(device, non_blocking=True).float() / 127.5 - 1
        return x, None if self.labels is None else self.labels[i].to(device, non_blocking=True)
