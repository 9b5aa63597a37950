"""Draw N-way K-shot tasks from any set of images.

The pixels lie on the device as one uint8 tensor, and a batch is an index operation. Where they do not fit
there, they stay memory-mapped on the host, and the next batch is fetched while this one is computed.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from common.batch import Kind, TaskBatch, TaskDistribution
from common.device import machine_memory
from common.errors import UsageError
from common.random import Stream, task_stream
from tasks.images import ImageSet
from tasks.prefetch import Prefetch

ZOOM = 0.8  # "crop" shows between this part of the image's side and all of it
SHIFT = 1 / 8  # of the side, at most, in each direction
ANGLE = 15.0  # degrees, at most, to each side


class ImageTasks(TaskDistribution):
    """Tasks of `ways` different classes, with `shots` and `queries` different images of each.

    Labels follow the random order of the classes. Inputs `[tasks, ways * examples, channels, height, width]`
    in [0, 1]; labels int64 `[tasks, ways * examples]`, ordered by class.

    Args:
        images: the images, their classes and the splits. A split may be empty; sampling from it is an error.
        ways: classes of a task.
        shots, queries: images per class of the support and of the query set.
        quarter_turns: each class of a task is turned by 0, 90, 180 or 270 degrees, in every split.
        augment: random changes of each training image, independent of the others. "flip" mirrors left and
            right half the time; "crop" shows 0.8 to 1 of the side, moved by up to an eighth of it; "rotate"
            turns by up to 15 degrees. Pixels from outside are reflections.
        on_host: pixels stay on the host; None: if they would fill more than half of the device's free memory.

    Raises UsageError where a split has too few classes or a class too few images.
    """

    kind: Kind = "images"
    ways: int

    def __init__(
        self,
        images: ImageSet,
        *,
        ways: int,
        shots: int,
        queries: int,
        quarter_turns: bool = False,
        augment: tuple[str, ...] = (),
        on_host: bool | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.images = images
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.augment = augment
        self.device = torch.device(device)
        self.dtype = dtype
        self._check_sizes()
        pixels = images.load()
        self.on_host = not _fits(pixels.nbytes, self.device) if on_host is None else on_host
        table_device = torch.device("cpu") if self.on_host else self.device
        self.pixels = pixels.to(table_device)
        self.count = images.count.to(table_device)
        self.first = self.count.cumsum(0) - self.count  # [classes], position of a class's first image
        self.splits = {split: classes.to(table_device) for split, classes in images.splits.items()}
        self.largest = int(images.count.max())
        positions = torch.arange(pixels[0, 0].numel()).view(pixels.shape[2:])
        turned = torch.stack([torch.rot90(positions, quarters).flatten() for quarters in range(4)])
        self.turned = turned.to(self.device) if quarter_turns else None  # [4, pixels]
        self.prefetch = Prefetch(self._fetch)

    @property
    def examples(self) -> int:
        return self.ways * (self.shots + self.queries)

    @property
    def split_names(self) -> dict[str, list[str]]:
        if self.images.published:
            return {}
        names = self.images.names
        return {split: sorted(names[i] for i in part.tolist()) for split, part in self.images.splits.items()}

    def resized(self, shots: int) -> ImageTasks:
        other = copy.copy(self)
        other.shots = shots
        other._check_sizes()
        other.prefetch = Prefetch(other._fetch)
        return other

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        if not len(self.splits[split]):
            raise UsageError(f"{self.images.source} has no {split} classes: add them, or use another split")
        if self.on_host:
            pixels = self.prefetch(split, seed, int(iteration), tasks).to(self.device, non_blocking=True)
        else:
            pixels = self._gather(self._draw_rows(stream, split))
        if self.turned is not None:
            pixels = self._turn(pixels, stream.at("rotations").words(self.ways) >> 30)
        support, query = pixels.split([self.shots, self.queries], 2)
        augmentation = stream.at("augmentation") if split == "train" and self.augment else None
        return TaskBatch(
            *self._examples(support, augmentation and augmentation.at("support")),
            *self._examples(query, augmentation and augmentation.at("query")),
        )

    def _draw_rows(self, stream: Stream, split: str) -> Tensor:
        """Return positions of images `[tasks, ways, shots + queries]`, on the stream's device."""
        classes = self.splits[split]
        classes = classes[stream.at("classes").distinct(self.ways, len(classes))]  # [tasks, ways]
        order = stream.at("drawings").words(self.ways * self.largest).unflatten(1, (self.ways, self.largest))
        # A smaller class has no image at the last positions: they come after every 32-bit word.
        absent = torch.arange(self.largest, device=order.device) >= self.count[classes][..., None]
        order = order + (absent.long() << 32)
        chosen = order.topk(self.shots + self.queries, largest=False).indices
        return self.first[classes][..., None] + chosen

    def _gather(self, rows: Tensor) -> Tensor:
        """Copy whole images: `[tasks, ways, examples, channels, height, width]`."""
        return self.pixels.index_select(0, rows.flatten()).unflatten(0, rows.shape)

    def _fetch(self, split: str, seed: int, iteration: int, tasks: range) -> Tensor:
        """Read a batch's pixels from the memory map."""
        pixels = self._gather(
            self._draw_rows(task_stream(split, seed, iteration, tasks, self.pixels.device), split)
        )
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    def _turn(self, pixels: Tensor, quarters: Tensor) -> Tensor:
        """Turn each class `[tasks, ways]` of the pixels by its number of quarters."""
        assert self.turned is not None
        flat = pixels.flatten(4)
        positions = self.turned[quarters][:, :, None, None]  # [tasks, ways, 1, 1, pixels]
        return flat.gather(4, positions.expand(flat.shape)).view(pixels.shape)

    def _examples(self, pixels: Tensor, augmentation: Stream | None) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of `[tasks, ways, examples, channels, height, width]` pixels."""
        tasks, ways, examples = pixels.shape[:3]
        x = pixels.flatten(1, 2).to(self.dtype).div_(255)  # in place: the conversion has made a copy
        if augmentation is not None:
            x = augment_images(x, self.augment, augmentation)
        labels = torch.arange(ways, device=x.device).repeat_interleave(examples)
        return x, labels.expand(tasks, -1)

    def _check_sizes(self) -> None:
        """Refuse splits with too few classes and classes with too few images, before any pixel is read."""
        images, needed = self.images, self.shots + self.queries
        for split, classes in images.splits.items():
            if 0 < len(classes) < self.ways:
                raise UsageError(
                    f"-n {self.ways} is more than the classes of the {split} split of {images.source}, "
                    f"{len(classes)}: lower -n, or add classes"
                )
            for number in classes[images.count[classes] < needed].tolist():
                raise UsageError(
                    f"-k {self.shots} plus -q {self.queries} is {needed}, but class {images.names[number]} "
                    f"({split}) of {images.source} has {images.count[number]} images: lower -k or -q, or add "
                    "images"
                )


def augment_images(x: Tensor, kinds: tuple[str, ...], stream: Stream) -> Tensor:
    """Change each of the images `[tasks, images, channels, side, side]` as its task's stream says."""
    tasks, images = x.shape[:2]
    if "flip" in kinds:
        mirrored = stream.at("flip").words(images) >> 31 == 1
        x = torch.where(mirrored[..., None, None, None], x.flip(-1), x)
    if not {"crop", "rotate"} & set(kinds):
        return x
    precise = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot tell two pixels apart
    one, zero = (torch.full((tasks, images), value, device=x.device, dtype=precise) for value in (1.0, 0.0))
    zoom, right, down, angle = one, zero, zero, zero
    if "crop" in kinds:
        zoom = stream.at("zoom").uniform(images, ZOOM, 1.0, precise)
        # The sides are 2 long in the coordinates of the grid.
        right, down = stream.at("shift").uniform(2 * images, -2 * SHIFT, 2 * SHIFT, precise).chunk(2, 1)
    if "rotate" in kinds:
        angle = torch.deg2rad(stream.at("angle").uniform(images, -ANGLE, ANGLE, precise))
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    maps = torch.stack([cosine, -sine, right, sine, cosine, down], -1).view(tasks * images, 2, 3)
    flat = x.flatten(0, 1)
    grid = F.affine_grid(maps, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat.to(precise), grid, padding_mode="reflection", align_corners=False)
    return moved.to(x.dtype).view(x.shape)


def _fits(size: int, device: torch.device) -> bool:
    """Return whether this many bytes are less than half of the device's free memory, or of this machine's."""
    if device.type == "cuda":
        return size <= torch.cuda.mem_get_info(device)[0] // 2
    memory = machine_memory()
    return memory is None or size <= memory // 2
