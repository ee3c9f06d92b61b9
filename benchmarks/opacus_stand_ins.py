# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins for what Opacus' examples download, and for packages of data they come from; runs one script on them.

    python -m benchmarks.opacus_stand_ins SCRIPT [ARGUMENTS...]

Random images, names and sentences of the right shapes; a narrow residual network and a tiny BERT in place of the
large ones; `.cuda()` stays on the CPU. What a script does with Opacus is not touched.
"""

from __future__ import annotations

import random
import runpy
import sys
import types
import urllib.request
import warnings
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

NUM_IMAGES, NUM_SENTENCES = 120, 96
NUM_NAMES = 20_074  # as many as the real ones: delta is compared with them


class Images(torch.utils.data.Dataset):
    """Random images as torchvision's data sets give them: `data`, `targets`, and items that go through `transform`."""

    shape = (1, 28, 28)

    def __init__(self, root=None, train=True, download=False, transform=None):
        generator = torch.Generator().manual_seed(int(train))
        self.data = torch.randint(0, 256, (NUM_IMAGES, *self.shape), generator=generator, dtype=torch.uint8)
        self.targets = torch.arange(NUM_IMAGES) % 10
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image = self.data[index]
        return (self.transform(image) if self.transform else image), int(self.targets[index])


class Colours(Images):
    """Of CIFAR-10's shape."""

    shape = (3, 32, 32)


def _compose(steps):
    def run(image):
        for step in steps:
            image = step(image)
        return image

    return run


def _to_tensor(image):
    return image.float() / 255


def _normalised(mean, std):
    return lambda image: (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _resized(size):
    return lambda image: F.interpolate(image[None].float(), (size, size))[0].to(torch.uint8)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs, outputs, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), norm(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        """Images to features."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A narrow residual network."""

    def __init__(self, num_classes=1000, norm_layer=nn.BatchNorm2d, pretrained=False, weights=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm_layer(16)
        self.layers = nn.Sequential(Block(16, 32, norm_layer), Block(32, 64, norm_layer))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        """Images to logits."""
        x = self.layers(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _module(name, **members):
    found = types.ModuleType(name)
    found.__spec__ = ModuleSpec(name, None)  # others ask whether there is such a package
    vars(found).update(members)
    sys.modules[name] = found
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, found)
    return found


def _vision():
    _module("torchvision", __path__=[])
    _module("torchvision.datasets", MNIST=Images, CIFAR10=Colours)
    _module(
        "torchvision.transforms", Compose=_compose, ToTensor=lambda: _to_tensor, Normalize=_normalised,
        Resize=_resized, RandomCrop=lambda *_, **__: lambda x: x, RandomHorizontalFlip=lambda: lambda x: x,
    )  # fmt: skip
    _module("torchvision.models", resnet18=ResNet)
    _module("torchvision.utils", save_image=lambda *_, **__: None)


def _words(generator, most):
    return [
        generator.choice("good bad film plot dull bright cat dog runs sleeps".split()) for _ in range(most)
    ]


class Tokenizer:
    """Words to numbers."""

    pad_token = "[PAD]"

    @classmethod
    def from_pretrained(cls, *_, **__):
        """The one there is."""
        return cls()

    def __len__(self):
        return 200

    def __call__(self, texts, truncation=True, max_length=128):
        """Numbers of each text."""
        return {"input_ids": [self.ids(text, max_length) for text in texts]}

    def ids(self, text, most):
        """At most `most` numbers."""
        return [2 + sum(map(ord, word)) % 190 for word in text.split()][:most]


class Sentences(dict):
    """What `datasets.load_dataset` returns, as far as it is used."""

    def map(self, function, batched):
        """Add what `function` makes of all texts."""
        for name, rows in self.items():
            found = function({"text": [row["text"] for row in rows]})
            self[name] = [row | {key: v[i] for key, v in found.items()} for i, row in enumerate(rows)]
        return self

    def set_format(self, type, columns):
        """Keep `columns`, as tensors."""
        for name, rows in self.items():
            self[name] = [{key: torch.tensor(row[key]) for key in columns} for row in rows]


def _load_dataset(name, **_):
    generator = random.Random(0)
    rows = [{"text": " ".join(_words(generator, 12)), "label": i % 2} for i in range(NUM_SENTENCES)]
    return Sentences(train=list(rows), test=rows[:20])


class Frame(list):
    """What `pandas.read_csv` returns, as far as it is used."""

    def __getitem__(self, key):
        return self if isinstance(key, list) else super().__getitem__(key)

    def iterrows(self):
        """Number and row."""
        return enumerate(self)


def _read_csv(path, sep):
    generator, labels = random.Random(0), ("contradiction", "entailment", "neutral")
    rows = ({f"sentence{n}": " ".join(_words(generator, 6)) for n in (1, 2)} for _ in range(NUM_SENTENCES))
    return Frame(row | {"gold_label": labels[i % 3]} for i, row in enumerate(rows))


def _features(examples, tokenizer, label_list, max_length, output_mode):
    found = []
    for example in examples:
        ids = tokenizer.ids(f"{example.text_a} {example.text_b}", max_length)
        rest = 20 - len(ids)
        found.append(
            types.SimpleNamespace(
                input_ids=ids + [0] * rest, attention_mask=[1] * len(ids) + [0] * rest, token_type_ids=[0] * 20,
                label=label_list.index(example.label),
            )
        )  # fmt: skip
    return found


def _language():
    import transformers

    def config(*_, num_labels=2, **__):
        return transformers.BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            num_labels=num_labels,
        )  # fmt: skip

    transformers.BertConfig.from_pretrained = config
    model = transformers.BertForSequenceClassification
    model.from_pretrained = lambda *_, config, **__: model(config)
    top = sys.modules["transformers"]  # another module by now: it puts itself anew where models are loaded
    top.BertTokenizer = top.BertTokenizerFast = Tokenizer
    _module("transformers.data", __path__=[])
    _module("transformers.data.processors", __path__=[])
    _module("transformers.data.processors.utils", InputExample=types.SimpleNamespace)
    _module("transformers.data.processors.glue", glue_convert_examples_to_features=_features)
    _module("datasets", load_dataset=_load_dataset)
    _module("pandas", read_csv=_read_csv)


def write_names(folder: Path) -> None:
    """Made-up names of 18 languages, one a line, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    names = ["".join(generator.choice("abcdefghijklmnop") for _ in range(4)) for _ in range(NUM_NAMES)]
    for number in range(18):
        (folder / f"Language{number}.txt").write_text("\n".join(names[number::18]) + "\n")


def _retrieve(url, filename):
    with zipfile.ZipFile(filename, "w") as archive:
        if "snli" in url:
            archive.writestr("snli_1.0/snli_1.0_train.txt", "")
        else:
            write_names(Path("made-up"))
            for path in Path("made-up").iterdir():
                archive.write(path, f"data/names/{path.name}")


def install() -> None:
    """Put the stand-ins in place."""
    from tqdm import tqdm

    _language()
    _vision()
    _module("tqdm.notebook", tqdm=tqdm)
    _module("IPython", __path__=[])
    _module("IPython.display", Image=lambda **_: None)
    _module("requests")
    urllib.request.urlretrieve = _retrieve
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.synchronize = lambda *_: None
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


if __name__ == "__main__":
    install()  # whose classes can be pickled, other than those of __main__
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
