"""Masks from metrics: NNI's own ``generate_sparsity`` for every key of a config list, and where ours differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

from nni.compression.pruning.tools import generate_sparsity

from singe_plugin.errors import ConfigError
from singe_plugin.integrations.nni import SInGEPruner

from asked import asked
from nni_nets import BATCHES, channel_masks, example_of, make_net, metrics_of, nni_asked
from small_nets import Grouped, images

Masks = dict[str, dict[str, Tensor]]


# --- the rules, against NNI's ------------------------------------------------------------------------------------


def both(config: Any, metrics: Masks | None = None, model: nn.Module | None = None) -> tuple[Masks, Masks, Masks]:
    """Our masks and NNI's, from the same metrics, as wide as their targets; and the metrics."""
    model = model or make_net("chain")
    options: dict[str, Any] = {"criterion": "l2", "coupled": False, "mask_norms": False, "min_width": 0}
    pruner = SInGEPruner(model, config, **nni_asked(**options))
    if metrics is None:
        metrics = {m: {t: torch.rand_like(v) for t, v in ts.items()} for m, ts in metrics_of(pruner).items()}
    spaces = pruner._target_spaces
    ours, theirs = pruner._generate_sparsity(copy.deepcopy(metrics)), generate_sparsity(copy.deepcopy(metrics), spaces)

    def wide(masks: Masks) -> Masks:
        return {
            name: {
                target: mask.expand_as(space.target) if (space := spaces[name][target]).target is not None else mask
                for target, mask in targets.items()
            }
            for name, targets in masks.items()
            if targets
        }

    return wide(ours), wide(theirs), metrics


def assert_equal_masks(ours: Masks, theirs: Masks) -> None:
    assert {name: set(targets) for name, targets in ours.items()} == {n: set(targets) for n, targets in theirs.items()}
    for name, targets in theirs.items():
        for target, mask in targets.items():
            assert torch.equal(ours[name][target], mask), (name, target)
    assert any(bool((mask == 0).any()) for targets in theirs.values() for mask in targets.values())


W = {"op_types": ["Conv2d"]}
SAME: dict[str, list[dict[str, Any]]] = {
    "sparse_ratio": [{**W, "sparse_ratio": 0.5}],
    "a ratio that is no multiple of a channel": [{**W, "sparse_ratio": 0.39}],
    "sparse_threshold": [{**W, "sparse_threshold": 0.4}],
    "min_sparse_ratio": [{**W, "sparse_ratio": 0.1, "min_sparse_ratio": 0.45}],
    "max_sparse_ratio": [{**W, "sparse_ratio": 0.9, "max_sparse_ratio": 0.35}],
    "threshold below min": [{**W, "sparse_threshold": 1e-9, "min_sparse_ratio": 0.4}],
    "threshold above max": [{**W, "sparse_threshold": 2.0, "max_sparse_ratio": 0.4}],
    "threshold inside its limits": [{**W, "sparse_threshold": 0.5, "min_sparse_ratio": 0.0, "max_sparse_ratio": 1.0}],
    "ratio of 0": [{"op_names": ["conv1"], "sparse_ratio": 0.0}, {"op_names": ["conv2"], "sparse_ratio": 0.5}],
    "ratio of 1": [{**W, "sparse_ratio": 1.0}],
    "several entries": [
        {"op_names": ["conv1"], "sparse_ratio": 0.25}, {"op_names": ["conv2"], "sparse_threshold": 0.3},
    ],
    "global_group_id, equal blocks": [{**W, "granularity": [1, 1, 1, 1], "sparse_ratio": 0.5, "global_group_id": 1}],
    "global_group_id below min": [{**W, "sparse_ratio": 0.1, "global_group_id": 1, "min_sparse_ratio": 0.4}],
    "global_group_id above max": [{**W, "sparse_ratio": 0.8, "global_group_id": "a", "max_sparse_ratio": 0.4}],
    "two global groups": [
        {"op_names": ["conv1"], "granularity": [1, 1, 1, 1], "sparse_ratio": 0.5, "global_group_id": 1},
        {"op_names": ["conv2", "conv3"], "granularity": [1, 1, 1, 1], "sparse_ratio": 0.2, "global_group_id": 2},
    ],
    "dependency_group_id": [{"op_names": ["conv1", "dw"], "sparse_ratio": 0.5, "dependency_group_id": 1}],
    "dependency_group_id, internal_metric_block": [
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "dependency_group_id": "x", "internal_metric_block": 2},
        {"op_names": ["dw"], "sparse_ratio": 0.5, "dependency_group_id": "x", "internal_metric_block": 4},
    ],
    "out_channel": [{**W, "sparse_ratio": 0.5, "granularity": "out_channel"}],
    "in_channel": [{**W, "sparse_ratio": 0.5, "granularity": "in_channel"}],
    "blocks": [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5, "granularity": [2, 1, 3, 1]}],
    "blocks, padded at the back": [
        {**W, "exclude_op_names": ["dw"], "sparse_ratio": 0.5, "granularity": [[2, 2], "back", -1]},
    ],
    "default": [{**W, "sparse_ratio": 0.5, "granularity": "default"}],
    "target_names": [{**W, "sparse_ratio": 0.5, "target_names": ["weight"]}],
    "target_settings": [
        {**W, "target_settings": {"weight": {"sparse_ratio": 0.5}, "bias": {"sparse_ratio": 0.25}}}
    ],
    "align to another layer": [
        {"op_names": ["conv1"], "sparse_ratio": 0.5},
        {"op_names": ["bn1"], "target_names": ["weight", "bias"], "target_settings": {
            t: {"align": {"module_name": "conv1", "target_name": "weight", "dims": [0]}} for t in ("weight", "bias")}},
    ],
    "legacy sparsity": [{"op_types": ["Conv2d"], "sparsity": 0.5}],
    "legacy sparsity_per_layer": [{"op_types": ["Conv2d"], "sparsity_per_layer": 0.4}],
    "op_names_re, exclude_op_names": [
        {"op_names_re": ["conv.", "fc"], "exclude_op_names": ["conv2"], "sparse_ratio": 0.5},
    ],
    "exclude_op_types, exclude_op_names_re": [{
        "op_types": ["Conv2d", "Linear"], "exclude_op_types": ["Linear"], "exclude_op_names_re": [".*1"],
        "sparse_ratio": 0.5,
    }],
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_masks_are_those_of_nni(case: str) -> None:
    model = make_net("chain")
    model.dw = nn.Conv2d(8, 8, 3, groups=8)  # a layer as wide as conv1
    ours, theirs, _ = both(SAME[case], model=model)
    assert_equal_masks(ours, theirs)


def kept_of(masks: Masks) -> dict[str, list[int]]:
    return {name: channel.nonzero().flatten().tolist() for name, channel in channel_masks(masks).items()}


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def two_layers(**keys: Any) -> list[dict[str, Any]]:
    return [{"op_names": ["conv1", "dw"], **keys}]


def wide_chain() -> nn.Module:
    model = make_net("chain")
    model.dw = nn.Conv2d(8, 8, 3, groups=8)
    return model


RISING = {name: {"weight": column(*range(1, 9))} for name in ("conv1", "dw")}


def test_what_is_exactly_at_the_threshold_stays_as_in_nni() -> None:
    ours, theirs, _ = both(two_layers(sparse_threshold=4.0), RISING, wide_chain())
    assert kept_of(ours) == kept_of(theirs) == {"conv1": [3, 4, 5, 6, 7], "dw": [3, 4, 5, 6, 7]}


def test_difference_ties_go_by_position_where_nni_leaves_them_to_topk_or_keeps_all() -> None:
    level = {"conv1": {"weight": torch.ones(8, 1, 1, 1)}, "dw": {"weight": torch.ones(8, 1, 1, 1)}}
    ours, theirs, _ = both(two_layers(sparse_ratio=0.5), level, wide_chain())
    assert kept_of(ours) == {"conv1": [4, 5, 6, 7], "dw": [4, 5, 6, 7]}
    assert len(kept_of(theirs)["conv1"]) == 4
    ours, theirs, _ = both(two_layers(sparse_ratio=0.5, global_group_id=1), level, wide_chain())
    assert [len(kept) for kept in kept_of(theirs).values()] == [8, 8]  # nothing is below the threshold
    grains = 18 * 8 + 9 * 8
    masked = sum(18 * (8 - len(kept_of(ours)["conv1"])) + 9 * (8 - len(kept)) for kept in [kept_of(ours)["dw"]])
    assert grains / 2 - 18 < masked <= grains / 2


def test_difference_a_global_ratio_is_never_exceeded_where_nnis_heap_depends_on_the_order_of_the_layers() -> None:
    """Grains of 18 (conv1) and 9 (dw); 108 of 216 elements are to go."""
    metrics = {
        "conv1": {"weight": column(1, 2, 3, 4, 5, 14, 15, 16)},
        "dw": {"weight": column(6, 7, 8, 9, 10, 11, 12, 13)},
    }
    masked = []
    for order in (["conv1", "dw"], ["dw", "conv1"]):
        config = [{"op_names": [name], "sparse_ratio": 0.5, "global_group_id": 1} for name in order]
        ours, theirs, _ = both(config, metrics, wide_chain())
        assert kept_of(ours) == {"conv1": [5, 6, 7], "dw": [2, 3, 4, 5, 6, 7]}  # 5 * 18 + 2 * 9 = 108
        masked.append(sum(int((targets["weight"] == 0).sum()) for targets in theirs.values()))
    assert masked == [108, 135]  # of 108
    for seed in range(20):
        torch.manual_seed(seed)
        ours, theirs, metrics = both([{**W, "sparse_ratio": 0.37, "global_group_id": 1}])
        spaces = {name: values["weight"].numel() for name, values in ours.items()}
        masked = sum(int((values["weight"] == 0).sum()) for values in ours.values())
        aim = int(sum(spaces.values()) * 0.37)
        order = sorted((float(m), spaces[name] // len(metrics[name]["weight"])) for name in spaces
                       for m in metrics[name]["weight"].flatten())  # fmt: skip
        total, taken = 0, 0
        for _, grain in order:
            if total + grain > aim:
                break
            total, taken = total + grain, taken + 1
        assert masked == total


def test_difference_a_floor_of_units_stays_where_nni_masks_a_whole_layer() -> None:
    model = make_net("chain")
    config = [{**W, "sparse_threshold": 1e9}]
    pruner = SInGEPruner(model, config, **asked(batches=BATCHES, criterion="l2", coupled=False, mask_norms=False))
    metrics = metrics_of(pruner)
    assert all(not kept for kept in kept_of(generate_sparsity(metrics, pruner._target_spaces)).values())
    for name, kept in kept_of(pruner._generate_sparsity(metrics)).items():
        assert kept == [int(metrics[name]["weight"].argmax())]


def test_difference_the_bias_of_a_norm_is_masked_where_nni_sums_over_all_of_its_channels() -> None:
    ours, theirs, _ = both([{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}])
    for name, targets in ours.items():
        assert torch.equal(targets["bias"], targets["weight"])
        assert bool((targets["weight"] == theirs[name]["weight"]).all())
        assert bool((theirs[name]["bias"] == 1).all())


def test_difference_limits_and_thresholds_hold_in_a_dependency_group_where_nni_ignores_or_refuses_them() -> None:
    ours, theirs, _ = both(
        two_layers(sparse_ratio=0.25, min_sparse_ratio=0.5, dependency_group_id=1), RISING, wide_chain()
    )
    assert kept_of(ours)["conv1"] == kept_of(ours)["dw"] == [4, 5, 6, 7]
    assert kept_of(theirs)["conv1"] == [2, 3, 4, 5, 6, 7]
    pruner = SInGEPruner(
        wide_chain(), two_layers(sparse_threshold=3.5, dependency_group_id=1), **asked(criterion="l2", coupled=False,
        mask_norms=False),
    )  # fmt: skip
    assert kept_of(pruner._generate_sparsity(RISING)) == {"conv1": [3, 4, 5, 6, 7], "dw": [3, 4, 5, 6, 7]}
    with pytest.raises(AssertionError):
        generate_sparsity(RISING, pruner._target_spaces)


def test_difference_internal_blocks_hold_without_a_dependency_group_where_nni_ignores_them() -> None:
    ours, theirs, _ = both(two_layers(sparse_ratio=0.5, internal_metric_block=2), RISING, wide_chain())
    assert kept_of(ours)["conv1"] == [2, 3, 6, 7]
    assert kept_of(theirs)["conv1"] == [4, 5, 6, 7]


def test_internal_blocks_that_every_unit_has_its_share_of_restrict_nothing() -> None:
    """NNI's auto_set_denpendency_group_ids gives them to what a grouped convolution reads and writes."""
    blocks = {"conv1": 4, "conv2": 4, "dw": 1, "conv3": 1}
    kept = []
    for keys in ({}, {name: {"internal_metric_block": count} for name, count in blocks.items()}):
        config = [{"op_names": [name], "sparse_ratio": 0.5, **keys.get(name, {})} for name in blocks]
        torch.manual_seed(0)
        kept.append(kept_of(SInGEPruner(Grouped(), config, **asked(batches=images(), criterion="l2")).compress()[1]))
    assert kept[0] == kept[1]
    assert [len(kept[1][name]) for name in blocks] == [8, 16, 16, 4]
    for count, message in (
        (8, "cuts through channels that can only be masked together"),
        (3, "does not divide its 16"),
    ):
        wrong = [{"op_names": ["conv1"], "sparse_ratio": 0.5, "internal_metric_block": count}]
        with pytest.raises(ConfigError, match=f"'conv1': internal_metric_block={count} {message}"):
            SInGEPruner(Grouped(), wrong, **asked(batches=images(), criterion="l2"))


def test_difference_a_dependency_group_takes_part_in_its_global_group_where_nni_ranks_it_alone() -> None:
    config = [*two_layers(sparse_ratio=0.5, dependency_group_id=1, global_group_id=1),
              {"op_names": ["conv2"], "sparse_ratio": 0.5, "global_group_id": 1}]  # fmt: skip
    metrics = {**RISING, "conv2": {"weight": column(*range(10, 20))}}
    ours, theirs, _ = both(config, metrics, wide_chain())
    assert kept_of(ours)["conv1"] == kept_of(ours)["dw"] == []  # 216 elements below all of conv2's 720
    assert len(kept_of(ours)["conv2"]) == 10 - (468 - 216) // 72
    assert kept_of(theirs)["conv1"] == kept_of(theirs)["dw"] == [4, 5, 6, 7]


def test_difference_a_layer_without_a_limit_gives_all_that_a_global_ratio_wants_where_nni_gives_nothing() -> None:
    config = [{"op_names": ["conv1"], "sparse_ratio": 0.9, "global_group_id": 1, "max_sparse_ratio": 0.25},
              {"op_names": ["dw"], "sparse_ratio": 0.9, "global_group_id": 1}]  # fmt: skip
    ours, theirs, _ = both(config, RISING, wide_chain())
    assert [len(kept_of(masks)["dw"]) for masks in (ours, theirs)] == [0, 8]
    assert kept_of(ours)["conv1"] == kept_of(theirs)["conv1"] == [2, 3, 4, 5, 6, 7]


def test_difference_what_is_aligned_to_its_own_unpruned_layer_is_left_where_nni_fails() -> None:
    config = [{"op_names": ["conv1"], "sparse_ratio": 0.5}, {"op_names": ["conv2"], "target_names": ["bias"]}]
    pruner = SInGEPruner(make_net("chain"), config, **asked(criterion="l2", coupled=False, mask_norms=False))
    metrics = metrics_of(pruner)
    assert set(pruner._generate_sparsity(metrics)) == {"conv1"}
    with pytest.raises(AssertionError):
        generate_sparsity(metrics, pruner._target_spaces)
    config[1] = {**config[1], "target_settings": {"bias": {
        "align": {"module_name": "conv3", "target_name": "weight", "dims": [0]}}}}  # fmt: skip
    pruner = SInGEPruner(make_net("chain"), config, **asked(criterion="l2", coupled=False, mask_norms=False))
    with pytest.raises(ConfigError, match=r"conv2.bias is aligned to conv3.weight, which has no mask"):
        pruner.compress()


# --- what is beyond NNI ------------------------------------------------------------------------------------------


def test_legacy_lists_mean_what_todays_mean() -> None:
    def kept(config: Any, **options: Any) -> Any:
        return kept_of(
            SInGEPruner(make_net("chain"), config, **asked(batches=BATCHES, criterion="l2", **options)).compress()[1]
        )

    legacy = [{"op_types": ["Conv2d", "Linear"], "sparsity": 0.5}, {"op_names": ["fc"], "exclude": True}]
    assert kept(legacy) == kept([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    total = [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.9}]
    today = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.9, "global_group_id": 0}]
    assert kept(total) == kept(today) != kept([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert legacy[1] == {"op_names": ["fc"], "exclude": True}


def test_norms_of_timm_can_be_named_by_their_type() -> None:
    model = make_net("mobilenetv2")
    config = [{"op_types": ["Conv2d", "BatchNormAct2d"], "op_names_re": [r"blocks\.1\..*"], "sparse_ratio": 0.5}]
    kept = channel_masks(
        SInGEPruner(model, config, **asked(example_inputs=example_of("mobilenetv2"), criterion="l2")).compress()[1]
    )
    assert {"blocks.1.0.bn1", "blocks.1.1.bn3", "blocks.1.1.conv_dw"} <= set(kept)
    assert all(name.startswith("blocks.1.") for name in kept)
    assert all(int(mask.sum()) == len(mask) - len(mask) // 2 for mask in kept.values())
    assert torch.equal(kept["blocks.1.0.bn1"], kept["blocks.1.0.conv_pw"])


def test_of_a_layer_of_timm_with_further_parameters_the_weight_is_ranked() -> None:
    model = timm.create_model("test_nfnet", num_classes=3)
    config = [{"op_types": ["ScaledStdConv2d"], "sparse_ratio": 0.5}]
    masks = SInGEPruner(model, config, **asked(example_inputs=torch.zeros(1, 3, 32, 32), criterion="l2")).compress()[1]
    assert {tuple(targets) for targets in masks.values()} == {("weight", "bias")}
    assert all(int(kept.sum()) == len(kept) // 2 for kept in channel_masks(masks).values())


def test_layer_norms_and_layer_scales_go_with_the_channels_they_read() -> None:
    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 12, 8, 8), "num_classes": 3, "in_chans": 2}
    model = timm.models.ConvNeXt(**options)
    config = [{"op_types": ["Conv2d", "LayerNorm2d", "Linear"], "exclude_op_names": ["head.fc"], "sparse_ratio": 0.5}]
    pruner = SInGEPruner(model, config, **asked(example_inputs=torch.zeros(1, 2, 32, 32), criterion="l2"))
    kept = channel_masks(pruner.compress()[1])
    assert {"stem.0", "stem.1", "stages.0.blocks.0.mlp.fc2"} <= set(kept)
    assert torch.equal(kept["stem.0"], kept["stem.1"])
    assert torch.equal(kept["stem.0"], kept["stages.0.blocks.0.mlp.fc2"])
    assert torch.equal(kept["stem.0"], kept["stages.0.blocks.0.norm"])  # not in the config list, but masked along
    assert not pruner.partial  # the layer scales add nothing to what is masked


def test_embeddings_that_nni_cannot_mask_are_named() -> None:
    model = timm.create_model("test_vit", num_classes=3, init_values=1e-3, depth=1)
    config = [{"op_types": ["Linear", "Conv2d"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    pruner = SInGEPruner(
        model, config, coupled="unverified", **asked(example_inputs=torch.zeros(1, 3, 160, 160), criterion="l2")
    )
    assert list(pruner.partial) == ["patch_embed.proj"]
    assert "pos_embed" in pruner.partial["patch_embed.proj"][0]
