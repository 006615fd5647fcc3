"""Compile the experiment's train and eval step for a TPU topology that need not be there.

    python tests/compile_for_tpu.py TOPOLOGY CHIPS_PER_HOST PRECISION BATCH_SIZE

Prints a JSON line with what the compiler says of each: FLOPs a device, with the body of the scan
over time counted once, and bytes of memory a device. Needs libtpu.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.training_run import from_config
from experiments.training_run.config import Config
from lstm_flax import training
from lstm_flax.augment import distort


def placed(tree, mesh, spec):
    """Shapes and dtypes of a tree, laid out so over the mesh."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        tree,
    )


def main(topology, chips_per_host, precision, batch_size):
    config = Config(precision=precision, batch_size=int(batch_size))
    model, tx = from_config.model(config), from_config.optimizer(config, num_images=60_000)
    # XLA counts the scan's FLOPs, and not those of kernels.
    model = model.clone(core=model.core.clone(implementation="scan"))
    sample = jnp.zeros((1, 28, 28))
    state = jax.eval_shape(
        lambda key: training.create_train_state(model, tx, sample, key), jax.random.key(0)
    )
    batch = {
        "image": jnp.zeros((config.batch_size, 28, 28), jnp.uint8),
        "label": jnp.zeros(config.batch_size, jnp.int32),
        "mask": jnp.zeros(config.batch_size, bool),
    }
    bounds = [int(chips) for chips in chips_per_host.split("x")]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=[*bounds, 1]
    ).devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    arguments = (placed(state, mesh, P()), placed(batch, mesh, P("data")))
    key = placed(jax.random.key(0), mesh, P())
    with jax.set_mesh(mesh):
        steps = {
            "train": training.train_step.lower(*arguments, key, augment=distort),
            "eval": training.eval_step.lower(*arguments),
        }
        report = {"devices": len(devices), "kind": devices[0].device_kind}
        for name, step in steps.items():
            compiled = step.compile()
            memory = compiled.memory_analysis()
            report[name] = {
                "flops": compiled.cost_analysis()["flops"],
                "bytes": memory.temp_size_in_bytes
                + memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes,
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
