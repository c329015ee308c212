"""Small parts that keep to the contracts of fine-tuning: a model, data and a loss of a few values."""

from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from dit_accel.finetune.batch import Batch
from dit_accel.finetune.engine import Engine
from dit_accel.finetune.feed import Feed
from dit_accel.finetune.log import RunLog
from dit_accel.finetune.loop import Loop
from dit_accel.finetune.optimizers import make_optimizer
from dit_accel.finetune.parts import Parts
from dit_accel.finetune.progress import StepMeter
from dit_accel.finetune.state import TrainingState
from dit_accel.finetune.stop import StopRequest


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """The settings that the loop reads."""

    output_dir: str = "run"
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 8
    learning_rate: float = 0.05
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 3
    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    use_ema: bool = True
    ema_decay: float = 0.9
    max_nonfinite: int = 2
    seed: int = 3
    allow_tf32: bool = False
    device: str = "cpu"
    fsdp: bool = False
    checkpointing_steps: int = 3
    checkpointing_minutes: float | None = None
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    report_to: str = "none"
    tracker_name: str = "fake"
    logging_dir: str = "logs"
    sla: dict = field(default_factory=lambda: {"topk": 0.1})

    def to_dict(self):
        return asdict(self)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class FakeTransformer(nn.Module):
    """Predicts from noisy latents `[B, 4, 2, 2]` and a noise level."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(patch_size=2)
        self.blocks = nn.ModuleList([Block(5), Block(5)])
        self.head = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.zeros(1))  # fewer rows than processes
        self.sla = FakeSLA()

    def forward(self, x, sigmas):
        self.sla.note(x)
        tokens = x.flatten(2).transpose(1, 2)
        level = sigmas.view(-1, 1, 1).expand(*tokens.shape[:2], 1)
        h = torch.cat([tokens, level], dim=2)
        for block in self.blocks:
            h = block(h)
        out = self.head(h) * (1 + self.scale)
        return out.transpose(1, 2).reshape(x.shape)


class FakeSLA:
    """Counts as sparse attention does: calls, attended pairs and all pairs."""

    def __init__(self):
        self.layers = {
            "a": SimpleNamespace(scheduled=True, tally=torch.zeros(3, dtype=torch.int64)),
            "b": SimpleNamespace(scheduled=False, tally=torch.zeros(3, dtype=torch.int64)),
        }
        self.topk = 0.25
        self.sparse = True

    def note(self, x):
        if self.sparse:
            self.layers["a"].tally += torch.tensor([1, int(self.topk * 16), 16]) * len(x)

    def set_topk(self, value):
        self.topk = value

    def set_learning_step(self, step):
        self.learning_step = step


class FakeSamples:
    def __init__(self, count=12):
        generator = torch.Generator().manual_seed(5)
        self.latents = torch.randn(count, 4, 2, 2, generator=generator)
        self.ids = [f"sample-{i}" for i in range(count)]
        self.buckets = ["4x4"] * count


def load(samples, indices):
    return Batch(samples.latents[list(indices)], {}, tuple(samples.ids[i] for i in indices))


class FakeOrder:
    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def batch(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        return torch.randint(self.count, (self.batch_size,), generator=generator).tolist()


class FakeObjective:
    """Mean square of prediction minus (noise - latents). `spoil` maps steps to what the loss is multiplied with."""

    def __init__(self, config, spoil=None):
        self.config, self.spoil = config, spoil or {}

    def draw(self, latents, step, first):
        sigmas, noise = [], []
        for row in range(len(latents)):
            seed = (self.config.seed * 1000 + step) * 1000 + first + row
            generator = torch.Generator().manual_seed(seed)
            sigmas.append(torch.rand((), generator=generator))
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        return torch.stack(sigmas), torch.stack(noise)

    def __call__(self, model, batch, *, step, first):
        sigmas, noise = self.draw(batch.latents, step, first)
        noisy = torch.lerp(batch.latents, noise, sigmas.view(-1, 1, 1, 1))
        loss = (model(noisy, sigmas) - (noise - batch.latents)).square().mean()
        loss = loss * self.spoil.get(step, 1.0)
        return loss, {"loss": loss.detach(), "sigma": sigmas.mean()}


def make_loop(config, folder, *, checkpoint=None, spoil=None, stop=None, change=None, **more):
    """A loop over the fakes.

    Args:
        checkpoint: to go on from.
        change: called with the model before it is wrapped.
    """
    torch.manual_seed(config.seed)
    model = FakeTransformer()
    sla = model.sla
    if change is not None:
        change(model)
    named = {n: x for n, x in model.named_parameters() if x.requires_grad}
    names = {"weights": [n for n in named if n.endswith("weight")]}
    names["others"] = [n for n in named if not n.endswith("weight")]
    engine = Engine(config, folder)
    wrapped = engine.wrap(model, ("blocks",))
    now = dict(model.named_parameters())
    groups = [
        {
            "name": g,
            "params": [now[n] for n in ns],
            "lr": config.learning_rate,
            "weight_decay": 0.01,
        }
        for g, ns in names.items()
        if ns
    ]
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    named = {name: now[name] for name in named}
    optimizer = make_optimizer(config, groups)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    ema = EMAModel(named.values(), decay=config.ema_decay) if config.use_ema else None
    state = TrainingState(named, optimizer, scheduler, ema, engine.accelerator.scaler)
    after = None
    if checkpoint is not None:
        state.load(checkpoint)
        after = (checkpoint.state["stage"], checkpoint.step)
    samples = FakeSamples()
    processes = engine.processes
    size = config.train_batch_size * config.gradient_accumulation_steps * processes.count
    feed = Feed(
        samples,
        FakeOrder(len(samples.ids), size, config.seed),
        load,
        size=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=processes.rank,
        processes=processes.count,
        ahead=True,
    )
    parts = Parts(
        config=config,
        folder=folder,
        engine=engine,
        model=wrapped,
        objective=FakeObjective(config, spoil),
        feed=feed,
        state=state,
        log=RunLog(folder, is_main=processes.is_main, after=after, stages=("distillation",)),
        stop=stop or StopRequest(),
        meter=StepMeter(patch_size=2, device=engine.device, counters=state.counters),
        sla=sla,
        topk_at=lambda step: None,
        saved_config=config.to_dict(),
        samples_sha256=feed.samples_sha256,
        steps=config.max_train_steps,
    )
    for name, value in more.items():
        setattr(parts, name, value)
    return Loop(parts, 0 if checkpoint is None else checkpoint.step)


def values_of(state):
    """Everything that a checkpoint holds, as plain lists, for a comparison bit for bit."""
    tensors = {
        f"{group}/{name}": x.detach().double().flatten().tolist()
        for group, found in state.groups().items()
        for name, x in found.items()
    }
    numbers = state.numbers()
    numbers["counters"] = {k: x for k, x in numbers["counters"].items() if k != "seconds"}
    return tensors, numbers
