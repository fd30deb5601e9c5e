"""A worker with small models of every kind, and run directories created without Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import checkpoint
from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.run import record as run_record
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from lte_ray.worker import build_model
from tests.support.head_states import head_state

os.environ["HF_HUB_OFFLINE"] = "1"
SEED, CLASSES, WORDS = 5, 6, 40


class Cnn(nn.Module):
    """Convolutions, plain and of kinds that PEFT computes differently, batch normalization, two layers with a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 24, 1)
        self.wide = nn.Conv2d(24, 24, 3, padding="same")
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(24, 8, 3, padding=2, dilation=2)
        self.line = nn.Conv1d(8, 12, 3, padding=1, stride=2)
        self.mid, self.twin = nn.Linear(12, 12), nn.Linear(12, 12)
        self.twin.weight = self.mid.weight
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.wide(torch.relu(self.point(x))))
        x = torch.relu(self.dilated(torch.relu(self.grouped(x))))
        x = torch.relu(self.line(x.flatten(2))).mean(-1)
        return self.out(self.twin(torch.relu(self.mid(x))))


class Words(nn.Module):
    """An embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.mid = nn.Linear(16, 16, bias=False)
        self.logits = nn.Linear(16, WORDS, bias=False)
        self.logits.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.logits(torch.tanh(self.mid(self.embed(words))))


class Wrapped(nn.Module):
    """A model of transformers in an attribute."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, words: Tensor) -> Tensor:
        return self.net(words)


class Headed(Wrapped):
    """With another trained layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.head = nn.Linear(WORDS, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.net(words).logits)


class Lone(nn.Module):
    """With a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.embed, self.out = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.embed(words) * self.scale)


class Attending(nn.Module):
    """An encoder layer of torch, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.block(self.embed(words)))


class Attended(nn.Module):
    """torch's attention between larger linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.out = nn.Embedding(WORDS, 16), nn.Linear(16, 64), nn.Linear(64, WORDS)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.out(torch.relu(self.up(self.attention(x, x, x)[0])))


class Ends(nn.Module):
    """A layer whose name is the end of another's: `up` and `block.up`, or of a part of PEFT's layers: `out`, lora_dropout."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.embed, self.block, self.last = nn.Embedding(WORDS, 16), nn.Module(), last
        self.block.up, self.block.down, self.block.more = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)
        self.add_module(last, nn.Linear(16, WORDS))

    def forward(self, words: Tensor) -> Tensor:
        return self.get_submodule(self.last)(self.block.more(self.block.down(torch.relu(self.block.up(self.embed(words))))))


class Clash(nn.Module):
    """A norm named `layer`, as PEFT's base_layer ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.last = nn.Embedding(WORDS, 16), nn.LayerNorm(16), nn.Linear(16, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.layer(self.embed(words)))


class Enclosed(nn.Module):
    """A lone parameter in a module that contains nearly all of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Lone(), nn.Linear(WORDS, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.body(words))


class Counting(nn.Module):
    """With a buffer that training changes and that isn't merged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.gate = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS), nn.Module()
        self.gate.register_buffer("seen", torch.ones(()))

    def forward(self, words: Tensor) -> Tensor:
        if self.training:
            self.gate.seen += 0.25
        return self.out(self.embed(words) / self.gate.seen)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=2, **none))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes, **none))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=16, **sizes))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=CLASSES, **sizes, **none))


def classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=WORDS, num_labels=CLASSES, **sizes))


def named() -> nn.Module:
    """GPT-2 with the name of a model, as `from_pretrained` gives it."""
    model = gpt2()
    model.config._name_or_path = "gpt-tiny"
    return model


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=CLASSES, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attended": Attended,
    "attending": Attending,
    "bert": bert,
    "clash": Clash,
    "classifier": classifier,
    "cnn": Cnn,
    "counting": Counting,
    "enclosed": Enclosed,
    "ends in out": lambda: Ends("out"),
    "ends in up": lambda: Ends("up"),
    "gpt2": gpt2,
    "headed": lambda: Headed(gpt2()),
    "llama": llama,
    "lone": Lone,
    "named": named,
    "resnet": resnet,
    "vit": vit,
    "words": Words,
    "wrapped": lambda: Wrapped(gpt2()),
}
IMAGES = ("cnn", "resnet", "vit")


@dataclass
class ExportWorker:
    """Trains one of the models on noise, so that everything in it changes."""

    kind: str = "gpt2"
    lr: float = 0.01

    def build_model(self) -> nn.Module:
        return MODELS[self.kind]()

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield inputs(self.kind, 100 * shard.cursor + shard.head), torch.arange(4) % CLASSES
            shard = shard.at(shard.cursor + 1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = logits(model, batch[0])
        return F.cross_entropy(found.reshape(-1, found.shape[-1]), batch[1].repeat_interleave(found[..., 0].numel() // 4))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=self.lr)


class Needy(ExportWorker):
    """Has a required setting that runs of other workers don't record."""

    def __init__(self, need: int) -> None:
        super().__init__()
        self.need = need


def inputs(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind in IMAGES:
        return torch.randn(4, 3, 16, 16, generator=generator)
    return torch.randint(WORDS, (4, 8), generator=generator)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def settings(**lte: Any) -> Settings:
    """Two heads of rank 2, three merges."""
    merge = MergeConfig(merge_iter=lte.pop("merge_iter", 2), policy=lte.pop("policy", "average"))
    train = TrainConfig(steps=lte.pop("steps", 6), seed=SEED, ema=lte.pop("ema", 0.0))
    return Settings("run", LTEConfig(**{"num_heads": 2, "lora_r": 2, "lora_alpha": 8.0} | lte), merge, train)


def train_without_contributing(head: Any, steps: int = 2) -> None:
    """Trains a head without contributing, so that it is ahead of the main weights."""
    with head.rng.swapped_in():
        for _ in range(steps):
            head.backward(head.next_batch())
            head.finish_step()


def save_run(
    root: Path,
    kind: str,
    given: Settings,
    *,
    name: str = "run",
    heads: tuple[int, ...] = (0, 1),
    ahead: bool = False,
    whole: bool = True,
    worker: ExportWorker | None = None,
) -> tuple[Path, InProcessRun]:
    """Trains without Ray, and writes what a run writes: ``run.toml``, a checkpoint, ``model.safetensors``.

    Args:
        heads: the heads whose states are in the checkpoint.
        ahead: whether each head then trains beyond the last merge.
        whole: whether the run has finished.
        worker: use this instead of the worker that builds `kind`.
    """
    worker = worker or ExportWorker(kind)
    given = prepare(worker, given).complete(given)
    directory = RunDirectory.open(str(root), name)
    storage = StorageConfig(name=name, storage=str(root))
    record = run_record.make_record(
        worker,
        "tests.support.export_runs:ExportWorker",
        dataclasses.replace(given, run=name),
        PlacementConfig(),
        storage,
        FailureConfig(),
    )
    run_start.create_run(directory, record, storage)
    done = run_in_process(worker, given)
    if ahead:
        for head in done.heads:
            train_without_contributing(head)
    write_checkpoint(directory, given, done, heads)
    if whole:
        run_record.write_model(directory, prepare(worker, given), done.base, done.coordinator.ema)
    return root / name, done


def write_checkpoint(directory: RunDirectory, given: Settings, done: InProcessRun, heads: tuple[int, ...] = (0, 1)) -> None:
    version = done.coordinator.version
    files = [checkpoint.write_base(directory, version, done.plan, done.base)]
    if done.coordinator.ema is not None:
        files.append(checkpoint.write_ema(directory, version, done.plan, done.coordinator.ema))
    files += [checkpoint.write_head(directory, version, head, *head_state(done.heads[head])) for head in heads]
    facts = {"run": "run", "step": given.train.steps, "lte": dataclasses.asdict(given.lte), "losses": {}}
    checkpoint.commit(directory, version, heads, files, facts)


def built(kind: str) -> nn.Module:
    """Returns the initial model, as a user builds it."""
    return build_model(ExportWorker(kind), SEED).eval()
