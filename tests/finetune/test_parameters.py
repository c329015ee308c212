"""Trained parameters: exactly those that a loss reaches, in the right groups, in fp32."""

import pytest
import torch

import dit_accel
from dit_accel.config.sla import ROUTERS
from dit_accel.finetune.objectives import Objective
from dit_accel.finetune.parameters import prepare
from dit_accel.finetune.teacher import make_teacher

from .cases import batch, calibrate, config, copies, null_conditions, sparse_attention
from .families.cases import FAMILIES, trainable

needs_learned_router = pytest.mark.skipif(
    "learned" not in ROUTERS, reason="SLAConfig has no learned router"
)
TRAIN = ("all", "lora", "sla")


def prepared_for(family, dtype=torch.float32, **changed):
    prepared = trainable(family)
    prepared.transformer.to(dtype)
    settings = config(**changed)
    return prepared, settings, prepare(prepared.transformer, settings)


def backward(prepared, settings, family):
    made = Objective(settings, prepared, make_teacher(prepared, settings), null_conditions(family))
    made(prepared.transformer, batch(prepared, family), step=0, first=0)[0].backward()


@pytest.mark.parametrize(
    ("family", "train", "combine"),
    [
        *((f, t, "proj") for f in FAMILIES for t in TRAIN if (f, t) != ("lumina", "lora")),
        *(("wan", t, "alpha") for t in TRAIN),
    ],
)
def test_every_parameter_that_trains_gets_a_gradient_and_no_other(family, train, combine):
    prepared, settings, trained = prepared_for(
        family, train=train, sla={"combine": combine, "dense_layers": 1}
    )
    calibrate(prepared.transformer)
    backward(prepared, settings, family)
    named = dict(prepared.transformer.named_parameters())
    assert trained.named.keys() <= named.keys()
    for name, parameter in named.items():
        trains = name in trained.named
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name
        if trains:
            assert trained.named[name] is parameter
            # What an adapter multiplies with is zero at first, and so is its other half's gradient.
            assert parameter.grad.any() or "lora_A" in name, name
            assert parameter.dtype == torch.float32
    if train == "all":
        left = [x for x in named if x not in trained.named and ".sla." not in x]
        known = ("pad_token", "add_q_proj", "norm_added_q")
        assert all(any(x in name for x in known) for name in left)
        assert len(left) <= 3
    dense = next(iter(sparse_attention(prepared.transformer).layers))
    assert not any(name.startswith(f"{dense}.sla") for name in trained.named)
    sla = [x for x in trained.named if ".sla." in x]
    assert len(sla) == (len(sparse_attention(prepared.transformer).layers) - 1) * (
        2 if combine == "proj" else 1
    )


@pytest.mark.parametrize("combine", ["none", "shared_softmax"])
@pytest.mark.parametrize("train", ["all", "lora"])
def test_sparse_attention_without_weights_trains_the_model(train, combine):
    prepared, settings, trained = prepared_for("wan", train=train, sla={"combine": combine})
    backward(prepared, settings, "wan")
    assert {x["name"] for x in trained.groups} <= {"weights", "biases_norms"}
    assert all(x.grad is not None for x in trained.named.values())


@needs_learned_router
@pytest.mark.parametrize("combine", ["none", "alpha"])
def test_a_learned_router_trains(combine):
    prepared, settings, trained = prepared_for(
        "wan", train="sla", router="learned", sla={"combine": combine, "dense_layers": 1}
    )
    calibrate(prepared.transformer)
    backward(prepared, settings, "wan")
    assert trained.named
    assert all(x.grad is not None and x.grad.any() for x in trained.named.values())


def test_groups_have_their_own_rates_and_only_matrices_decay():
    rates = {"learning_rate": 2e-5, "sla_learning_rate": 3e-3, "adam_weight_decay": 0.2}
    prepared, _, trained = prepared_for("wan", train="all", sla={"combine": "proj"}, **rates)
    groups = {x["name"]: x for x in trained.groups}
    assert list(groups) == ["weights", "biases_norms", "sla"]
    assert [x["lr"] for x in trained.groups] == [2e-5, 2e-5, 3e-3]
    assert [x["weight_decay"] for x in trained.groups] == [0.2, 0.0, 0.0]
    listed = [p for x in trained.groups for p in x["params"]]
    assert len({id(x) for x in listed}) == len(listed) == len(trained.named)
    assert all(a is b for a, b in zip(listed, trained.named.values(), strict=True))
    names = {id(x): name for name, x in prepared.transformer.named_parameters()}
    for group, x in groups.items():
        for parameter in x["params"]:
            name = names[id(parameter)]
            if group == "sla":
                assert ".sla." in name
            elif group == "weights":
                assert name.endswith(".weight")
                assert parameter.ndim >= 2
            else:
                assert parameter.ndim == 1 or "scale_shift_table" in name
    default = prepared_for("wan", train="sla", sla={"combine": "proj"}, learning_rate=7e-4)[2]
    assert [(x["name"], x["lr"]) for x in default.groups] == [("sla", 7e-4)]


def test_the_order_of_parameters_is_fixed():
    first, second = (list(prepared_for("sd3", train="lora")[2].named) for _ in range(2))
    assert first == second


def test_models_in_half_precision_train_in_fp32():
    prepared, _, trained = prepared_for("wan", torch.bfloat16, train="lora")
    assert {x.dtype for x in trained.named.values()} == {torch.float32}
    frozen = [x for n, x in prepared.transformer.named_parameters() if n not in trained.named]
    assert {x.dtype for x in frozen} >= {torch.bfloat16}


def test_adapters_compute_nothing_at_first_and_follow_rank_alpha_names_and_seed():
    plain = trainable("wan")
    given = batch(plain, "wan")
    level = torch.tensor([0.3, 0.7])
    prepared, _, trained = prepared_for(
        "wan", train="lora", rank=3, lora_alpha=6, lora_layers="attn1.to_q, ffn.net.2"
    )
    dit_accel.disable(prepared.transformer)
    with torch.no_grad():
        a, b = (
            x.velocity(x.transformer, given.latents, level, given.conditions)
            for x in (plain, prepared)
        )
    assert torch.equal(a, b)
    adapters = [x for x in trained.named if "lora_" in x]
    assert {x.split(".lora_")[0].split(".", 2)[2] for x in adapters} == {"attn1.to_q", "ffn.net.2"}
    assert len(adapters) == 2 * 2 * len(prepared.transformer.blocks)
    layer = prepared.transformer.blocks[0].attn1.to_q
    assert (layer.r["default"], layer.scaling["default"]) == (3, 2.0)

    def initial(seed):
        torch.manual_seed(seed + 100)  # what else happens in the process changes nothing
        return copies(prepared_for("wan", train="lora", seed=seed)[2].named)

    same, again, other = initial(0), initial(0), initial(1)
    assert all(torch.equal(same[x], again[x]) for x in same)
    assert not all(torch.equal(same[x], other[x]) for x in same)


def test_default_adapters_are_on_every_projection_of_attention():
    names = prepared_for("sd3", train="lora", sla={"combine": "none"})[2].named
    found = {x.split(".attn.")[1].split(".lora_")[0] for x in names}
    assert found == {
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    }


def test_what_cannot_train_is_refused():
    with pytest.raises(ValueError, match=r"^lora_layers='to_x,to_q': .*'to_x'.*to_q"):
        prepared_for("wan", train="lora", lora_layers="to_x,to_q")
    with pytest.raises(ValueError, match=r"^train='sla': no parameter trains.* sla.dense_layers=3"):
        prepared_for("wan", train="sla", sla={"dense_layers": 3})
    with pytest.raises(ValueError, match=r"^transformer: Linear cannot be fine-tuned"):
        prepare(torch.nn.Linear(2, 2), config())
