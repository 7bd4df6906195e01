"""JAX: training compiled by XLA, linear algebra, and arrays that come and go."""

import jax
import jax.numpy as jnp
import numpy

from result import Result, skip


def network(parameters, x):
    for weight, bias in parameters[:-1]:
        x = jax.nn.gelu(x @ weight + bias)
    weight, bias = parameters[-1]
    return x @ weight + bias


@jax.jit
def step(parameters, x, target):
    def loss(parameters):
        return jnp.mean((network(parameters, x) - target) ** 2)

    value, gradient = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(lambda p, g: p - 0.05 * g, parameters, gradient), value


@jax.jit
def algebra(a):
    return a @ a.T, jnp.linalg.cholesky(a @ a.T + jnp.eye(len(a))), jnp.fft.rfft(a), jnp.sort(a, axis=None)


def main():
    if jax.default_backend() not in ("gpu", "cuda"):
        skip(f"JAX has no GPU here, only {jax.default_backend()}")
    result = Result()
    sizes = (256, 1024, 1024, 256)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    parameters = [
        (jax.random.normal(key, (a, b)) / numpy.sqrt(a), jnp.zeros(b)) for key, a, b in zip(keys, sizes, sizes[1:])
    ]
    losses = []
    for number in range(50):
        x = jax.random.normal(jax.random.fold_in(keys[-1], number), (256, 256))
        parameters, value = step(parameters, x, x[:, ::-1])
        losses.append(value)
    losses = jnp.stack(losses)
    assert bool(jnp.isfinite(losses).all()) and losses[-1] < losses[0], "the training did not train"
    result.output("losses", losses)
    result.output("weights", *jax.tree.leaves(parameters))
    for name, part in zip(("matmul", "cholesky", "fft", "sort"), algebra(jax.random.normal(keys[0], (512, 512)))):
        result.output(name, part)
    kept = []
    for number in range(40):
        kept.append(jnp.full((1 + (number * 7919) % 30, 1 << 18), float(number)) * 2)
        if len(kept) > 8:
            kept.pop(number % 8)
    result.output("blocks", *[block[0] for block in kept])
    result.done()


main()
