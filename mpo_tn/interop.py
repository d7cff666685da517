"""To other tensor-network libraries; each is imported when it is asked for."""

from __future__ import annotations

import itertools
from typing import Any

from mpo_tn.chains.chain import Chain
from mpo_tn.linalg import library


def to_nodes(chain: Chain) -> list[Any]:
    """Fresh TensorNetwork nodes, in order, connected along the bonds. See :meth:`mpo_tn.MPO.to_nodes`."""
    # Imported here because it takes longer to load than the rest of the package together.
    import tensornetwork

    backend = {"torch": "pytorch"}.get(library(chain.cores[0]), library(chain.cores[0]))
    axes = ["left", "out", "in", "right"]
    nodes = [
        tensornetwork.Node(core, name=f"T{k}", axis_names=axes, backend=backend) for k, core in enumerate(chain.cores)
    ]
    for node, following in itertools.pairwise(nodes):
        tensornetwork.connect(node["right"], following["left"])
    return nodes
