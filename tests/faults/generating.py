"""Generated input for every reader: each takes it or refuses it in words of its own, and nothing else happens."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from greenprune.checkpoint import Checkpoint, CheckpointCorrupt, load_checkpoint, save_checkpoint
from greenprune.config import (
    FIELDS,
    Config,
    ConfigError,
    GateConfig,
    ModelConfig,
    UserError,
    load_config,
    parse_config,
)
from greenprune.data.folders import _Decoder, _Ticket, scan_tiny_imagenet
from greenprune.data.readers import read_fashion_mnist
from greenprune.gating import attach_gates
from greenprune.models import build_model, residual_blocks
from greenprune.surgery import Structure, StructureMismatch, replay
from greenprune.tracking import EventLog, EventsCorrupt, course_of, read_events, salvage_events

SCRATCH = Path(tempfile.mkdtemp(prefix="generated-"))
VALID = Config().to_dict()


def one_line(error: BaseException) -> bool:
    """Every refusal is one line that says something; always true, or the property fails."""
    assert str(error)
    assert "\n" not in str(error), str(error)
    return False


# Configs.

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "no", "null", "1e400", "-0", "[]", "{}", "&a", "*a", "!!python/name:os.system", "${HOME}", "$(x)"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def configs(draw: Any) -> str:
    """YAML that is a complete run, but for a few fields that hold something else; or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.text(max_size=80), VALUES.map(yaml.safe_dump)))
    values: dict[str, Any] = copy.deepcopy(VALID)
    for key in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3)):
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = draw(st.one_of(SCALARS, VALUES, near(key)))
    if draw(st.integers(0, 5)) == 0:
        values[draw(st.text(max_size=8))] = draw(VALUES)
    text = yaml.safe_dump(values, allow_unicode=True)
    if draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=3)) + text[at + draw(st.integers(0, 5)) :]
    return text


def near(key: str) -> st.SearchStrategy[Any]:
    """Values about as large as the one a field has."""
    section, _, name = key.rpartition(".")
    value = (VALID[section] if section else VALID)[name]
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return st.one_of(st.just(value), st.floats(0, 2), st.integers(-1, 100), st.just(-value), st.just(math.nan))
    return st.just(value)


def takes_config(text: str) -> bool:
    """Whether a file is a config; one that is comes back the same from what is written of it."""
    path = SCRATCH / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(path)
    except ConfigError as error:
        return one_line(error)
    _comes_back(config)
    return True


def _comes_back(config: Config) -> None:
    from greenprune.config import dump_config

    path = SCRATCH / "written.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert again.identity() == config.identity()


@st.composite
def overrides(draw: Any) -> list[str]:
    """A command line: fields that there are, with values of all kinds, and words that mean nothing."""
    known = st.sampled_from(sorted(FIELDS))
    words = st.one_of(SCALARS.map(str), st.text(max_size=10), st.integers(0, 50).map(str), st.floats(0, 1).map(str))
    flag = st.builds(lambda key, word: [f"--{key}={word}"], known, words)
    pair = st.builds(lambda key, word: [f"--{key}", word], known, words)
    odd = st.one_of(st.text(max_size=10), st.text(max_size=8).map(lambda text: f"--{text}")).map(lambda text: [text])
    return [word for part in draw(st.lists(st.one_of(flag, pair, odd), max_size=4)) for word in part]


def takes_overrides(args: list[str]) -> bool:
    """Whether a command line is a config."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            config = parse_config(args)
    except ConfigError as error:
        return one_line(error)
    except SystemExit as done:  # --help and its like
        return one_line(done) if done.code else False
    _comes_back(config)
    return True


# Structures.

DENSE = build_model(ModelConfig("resnet20"), classes=10, channels=1, image_size=8)
attach_gates(DENSE, GateConfig(units=["block", "channel"]))
UNITS = list(residual_blocks(DENSE))


@st.composite
def structures(draw: Any) -> Any:
    """What structure.json may hold: operations on units that there are or not, with a value or two of another kind."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    operations = []
    for _ in range(draw(st.integers(0, 5))):
        unit = draw(
            st.sampled_from([*UNITS, *(f"{unit}:hidden" for unit in UNITS), *(f"{unit}:0" for unit in UNITS), "x"])
        )
        operation = {
            "action": draw(st.sampled_from(["remove", "freeze"])),
            "unit": unit,
            "step": draw(st.integers(0, 100)),
            "epoch": draw(st.floats(0, 10)),
            "reason": draw(st.sampled_from(["off", "on", "settled"])),
        }
        if draw(st.booleans()):
            operation["channels"] = draw(st.lists(st.integers(-1, 20), max_size=20))
        if draw(st.integers(0, 3)) == 0:
            operation[draw(st.sampled_from([*operation, "channels", "extra"]))] = draw(VALUES)
        operations.append(operation)
    values: dict[str, Any] = {"format": 2, "operations": operations}
    if draw(st.integers(0, 5)) == 0:
        values[draw(st.sampled_from(["format", "operations", "more"]))] = draw(VALUES)
    return values


def takes_structure(values: Any) -> bool:
    """Whether plain values are a structure that fits the network; one that is survives JSON."""
    try:
        structure = Structure.from_dict(values)
    except StructureMismatch as error:
        return one_line(error)
    assert Structure.from_dict(json.loads(json.dumps(structure.to_dict()))) == structure
    network = copy.deepcopy(DENSE)
    try:
        replay(structure, network)
    except StructureMismatch as error:
        return one_line(error)
    return True


# Events.

EVENT = st.fixed_dictionaries(
    {
        "time": st.floats(0, 2e9),
        "step": st.integers(0, 1000),
        "kind": st.sampled_from(["start", "train", "epoch", "end"]),
    },
    optional={"energy/total_j": st.one_of(st.none(), st.floats(0, 1e9)), "x": VALUES},
)


@st.composite
def logs(draw: Any) -> bytes:
    """A log of events, some of which are something else, cut or changed somewhere."""
    lines = []
    for _ in range(draw(st.integers(0, 6))):
        event: Any = draw(EVENT)
        if draw(st.integers(0, 5)) == 0:
            event = {**event, draw(st.sampled_from(["time", "step", "kind", "energy/total_j"])): draw(VALUES)}
        if draw(st.integers(0, 9)) == 0:
            event = draw(VALUES)
        lines.append(json.dumps(event).encode() + b"\n")
    return draw(damaged(b"".join(lines)))


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes as they are, cut off, with some changed, or with some more."""
    how = draw(st.sampled_from(["whole", "cut", "changed", "changed", "longer", "zeros"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "changed":
        more = draw(st.binary(min_size=1, max_size=4))
        return content[:at] + more + content[at + len(more) :]
    if how == "longer":
        return content + draw(st.binary(max_size=20))
    return content[:at] + bytes(len(content) - at) if how == "zeros" else content


def takes_events(content: bytes) -> bool:
    """Whether a log is one; what can be read of it is, and what is appended comes after it."""
    path = SCRATCH / "events.jsonl"
    path.write_bytes(content)
    events, wrong = salvage_events(path)
    course_of(events)
    log = EventLog(path, [])
    log.record("train", 7)
    log.close()
    after, still_wrong = salvage_events(path)
    assert (after[:-1], still_wrong) == (events, wrong)
    assert after[-1]["step"] == 7
    try:
        assert read_events(path) == after
    except EventsCorrupt as error:
        assert wrong
        return one_line(error)
    assert not wrong
    return True


# Checkpoints' manifests.


def _checkpoint() -> Path:
    state = {"step": 3, "structure": {"format": 2, "operations": []}}
    return save_checkpoint(SCRATCH, 3, Checkpoint({"w": torch.ones(2)}, {"lr": 0.1}, state), 1)


CHECKPOINT = _checkpoint()
MANIFEST = (CHECKPOINT / "manifest.json").read_bytes()


@st.composite
def manifests(draw: Any) -> bytes:
    """A manifest in which something is changed, also with names that lead out of its folder."""
    if draw(st.booleans()):
        return draw(damaged(MANIFEST))
    values = json.loads(MANIFEST)
    name = draw(st.sampled_from(["../secret", "/etc/passwd", "model.safetensors/../x", "", "training.pt"]))
    entry = draw(st.one_of(VALUES, st.just({"bytes": 1, "sha256": "0" * 64})))
    where = draw(st.sampled_from(["files", "format", "score", "sha256", "a file", "all files"]))
    if where == "a file":
        values["files"][name] = entry
    else:
        values["files" if where == "all files" else where] = entry
    return json.dumps(values, indent=1).encode()


def takes_manifest(content: bytes) -> bool:
    """Whether a manifest is that of the checkpoint it lies in, which only the one that was written is."""
    (CHECKPOINT / "manifest.json").write_bytes(content)
    try:
        load_checkpoint(CHECKPOINT)
    except CheckpointCorrupt as error:
        return one_line(error if str(CHECKPOINT) in str(error) else ValueError())
    assert content == MANIFEST
    return True


# Data files.


@st.composite
def idx_files(draw: Any) -> tuple[bytes, bytes]:
    """Images and labels in IDX format: truncated, of another magic, with wrong counts or huge declared sizes."""
    count = draw(st.integers(0, 3))
    sizes = st.sampled_from([0, 1, 27, 28, 29, 2**16, 2**31, 2**32 - 1])
    shape = [
        draw(st.one_of(st.just(count), sizes)),
        draw(st.one_of(st.just(28), sizes)),
        draw(st.one_of(st.just(28), sizes)),
    ]
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + bytes(28 * 28 * count)
    said = draw(st.one_of(st.just(count), sizes))
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", said) + bytes(draw(st.integers(0, 12)) for _ in range(count))
    return draw(st.one_of(st.just(images), damaged(images))), draw(st.one_of(st.just(labels), damaged(labels)))


def takes_idx(files: tuple[bytes, bytes]) -> bool:
    """Whether two files are images and labels."""
    raw = SCRATCH / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in zip(("images-idx3", "labels-idx1"), files, strict=True):
        (raw / f"train-{name}-ubyte").write_bytes(content)
    try:
        samples = read_fashion_mnist(SCRATCH, True)
    except UserError as error:
        return one_line(error)
    assert samples.images.shape == (len(samples.labels), 1, 28, 28)
    assert len(samples.labels) > 0
    return True


@st.composite
def listings(draw: Any) -> tuple[bytes, bytes]:
    """The text files of Tiny ImageNet."""
    classes, annotations = b"n01\nn02\n", b"a.JPEG\tn01\t0\t0\t1\t1\nb.JPEG\tn02\t0\t0\t1\t1\n"
    odd = st.sampled_from([b"../..\n", b"n01/../n02\n", b"a.JPEG\tn03\n", b"../x.JPEG\tn01\n", b"\xff\xfe", b"\t\t\n"])
    return draw(st.one_of(damaged(classes), odd)), draw(st.one_of(damaged(annotations), odd))


def takes_listing(files: tuple[bytes, bytes]) -> bool:
    """Whether two files list a data set, of which every image lies below its folder."""
    base = SCRATCH / "tiny-imagenet-200"
    for folder in ("train/n01/images", "train/n02/images", "val/images"):
        (base / folder).mkdir(parents=True, exist_ok=True)
        for name in ("a.JPEG", "b.JPEG"):
            (base / folder / name).touch()
    (base / "wnids.txt").write_bytes(files[0])
    (base / "val" / "val_annotations.txt").write_bytes(files[1])
    try:
        tree = scan_tiny_imagenet(SCRATCH)
    except UserError as error:
        return one_line(error)
    assert all(base in path.resolve().parents for path, _ in tree.train + tree.evaluated)
    return True


def _encoded(kind: str) -> bytes:
    pixels = np.random.RandomState(0).randint(0, 256, (12, 10, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: _encoded(kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF")}
HUGE = {
    "PNG": IMAGES["PNG"][:16] + struct.pack(">2I", 60000, 60000) + IMAGES["PNG"][24:],
    "BMP": IMAGES["BMP"][:18] + struct.pack("<2i", 2**30, 2**30) + IMAGES["BMP"][26:],
    "PPM": b"P6\n1000000 1000000\n255\n" + bytes(30),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
}


@st.composite
def images(draw: Any) -> bytes:
    """Image files of every kind, damaged; some say that they are huge."""
    content = draw(st.sampled_from([*IMAGES.values(), *HUGE.values()]))
    return draw(damaged(content))


def takes_image(content: bytes) -> bool:
    """Whether a file is an image to train on."""
    path = SCRATCH / "image.JPEG"
    path.write_bytes(content)
    decoder = _Decoder([(path, 0)], v2.PILToTensor(), v2.PILToTensor())
    loaded = decoder[_Ticket(0, None)]
    if isinstance(loaded, str):
        return one_line(ValueError(loaded))
    assert loaded[0].shape[0] == 3
    return True


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool]]] = {
    "configs": (configs(), takes_config),
    "command lines": (overrides(), takes_overrides),
    "structures": (structures(), takes_structure),
    "events": (logs(), takes_events),
    "manifests": (manifests(), takes_manifest),
    "IDX files": (idx_files(), takes_idx),
    "listings": (listings(), takes_listing),
    "images": (images(), takes_image),
}
"""What is generated, and what takes it or refuses it."""
