"""A network is built again from what a checkpoint says of it, whatever the method."""

import dataclasses
import json

import pytest
import torch

from bacon_fast.engine.build import network_spec
from bacon_fast.engine.presets import PRESETS
from bacon_fast.methods import METHODS
from bacon_fast.models.network import DebiasedNetwork, Network, TeacherNetwork
from bacon_fast.models.spec import NetworkSpec, build_network
from bacon_fast.models.ssc import PrototypeNetwork


@pytest.mark.parametrize("method", METHODS)
def test_the_spec_of_every_method_survives_json_and_has_the_heads_that_its_parts_ask_for(method):
    config = PRESETS["digits"].config(method).replace(backbone="wrn-10-2", bn_momentum=0.25)
    spec = network_spec(config, 7)
    assert NetworkSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    network = build_network(spec)
    parts = method.split("+")
    kinds = {"ssc": PrototypeNetwork, "cossl": TeacherNetwork, "cdmad": DebiasedNetwork}
    kind = next((kinds[part] for part in parts if part in kinds), Network)
    assert type(network) is kind
    if method == "ssc":
        assert network.prototypes.shape == (7, 128) and network.temperature == 0.08
    else:
        assert network.head.out_features == 7
        assert (network.balanced_head is not None) == bool({"abc", "cossl"} & set(parts))
    momenta = {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {0.25}
