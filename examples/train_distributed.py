"""Trains a network on Fashion-MNIST on all devices of one process, of several processes, or of a cluster.

    python -m examples.train_distributed --processes 2 --mode fsdp
    srun python -m examples.train_distributed --cluster      # or mpirun; on Kubernetes, in each pod of an indexed Job

Writes checkpoints to --out after each epoch, and within the epoch with --save-every. `--resume` continues from the
last one, on the same or a different number of devices. After SIGTERM the run is saved and exits with status 4.
See docs/guides/multiple-devices.md.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time

LOST = 3
"""Exit status if another process was lost; --resume continues the run."""

TERMINATED = 4
"""Exit status after SIGTERM; the run was saved, and --resume continues it."""

GRACE = 5
"""The seconds that the other processes have to exit by themselves after one exits with an error."""


class Terminated(Exception):
    """Raised to end the run after it was saved."""


def main(args: argparse.Namespace) -> dict[str, float]:
    """Trains as one of the processes; returns the metrics on the test set."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import PartitionSpec

    import fcfunc
    from fcfunc import checkpoint, data, losses, sharding, train

    if args.cluster:
        jax.distributed.initialize(initialization_timeout=120, heartbeat_timeout_seconds=args.lost_after)
    elif args.processes > 1:
        jax.distributed.initialize(
            args.coordinator,
            num_processes=args.processes,
            process_id=args.process_id,
            coordinator_bind_address=args.bind or "127.0.0.1:" + args.coordinator.rpartition(":")[2],
            initialization_timeout=120,
            heartbeat_timeout_seconds=args.lost_after,
        )
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))  # again, because JAX installs its own handler
    first = jax.process_index() == 0

    def say(text):
        if first:
            print(text, flush=True)

    if args.data == "digits":
        training, test = data.split(data.digits(), (0.8, 0.2), seed=args.seed)
    else:
        training, test = data.fashion_mnist()
    training, test = ((d.x.reshape(len(d.x), -1), d.y) for d in (training, test))
    scale = 1.0 if args.data == "digits" else 255.0  # images stay bytes until a step uses them
    dims = args.dims or [training[0].shape[1], 512, 512, 10]

    mesh = sharding.make_mesh(model=args.model)
    say(f"{jax.device_count()} devices of {jax.process_count()} processes, {dict(mesh.shape)}, {args.mode}, {dims}")
    make_params = lambda key: fcfunc.init(key, dims)  # noqa: E731
    key = jax.random.key(args.seed)
    shapes = jax.eval_shape(make_params, key)
    specs = sharding.param_specs(shapes, mesh, args.mode, replicate=("classes",))  # ten classes fit on every device
    there = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    params = jax.jit(make_params, out_shardings=there)(key)

    # Every process has read all examples and keeps its part. If each reads only a part, use sharding.global_batch.
    # The number of examples is the same on any usual number of devices, because the order of an epoch depends on it.
    whole = len(training[1]) - len(training[1]) % math.lcm(128, mesh.shape["data"])
    training = sharding.shard(jax.tree.map(lambda a: a[:whole], training), PartitionSpec("data"), mesh)
    test = sharding.shard(test, PartitionSpec("data" if len(test[1]) % mesh.shape["data"] == 0 else None), mesh)

    def loss_fn(params, batch, key):
        del key
        images, labels = batch
        logits = fcfunc.apply(params, images.astype(jnp.float32) / scale)
        loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)}

    steps = -(-len(training[1]) // args.batch_size)
    optimizer = optax.sgd(optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps), momentum=0.9)
    state = train.init_state(params, optimizer, jax.random.fold_in(key, 1))
    config = {
        name: getattr(args, name) for name in ("data", "epochs", "batch_size", "accumulate", "learning_rate", "seed")
    }
    config |= {"dims": dims, "examples": whole}
    saved = checkpoint.steps(args.out)
    if args.resume and not saved:
        raise FileNotFoundError(f"--resume: {args.out} holds no checkpoint")
    if saved and not args.resume:
        raise ValueError(f"--out {args.out}: holds checkpoints; use --resume, or choose another folder")
    if saved:
        say(f"resumes from step {saved[-1]}")

    def on_steps(state):  # after each save
        terminate = bool(asked)
        if jax.process_count() > 1:  # either all processes end, or none
            terminate = bool(multihost_utils.process_allgather(np.array(terminate)).any())
        if terminate:
            raise Terminated(f"terminated; saved at step {int(state.step)}, resume with --resume")

    def on_epoch(state, record):
        say(f"epoch {record['epoch']}/{args.epochs}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.4f}")

    options = {"epochs": args.epochs, "batch_size": args.batch_size, "accumulate": args.accumulate}
    options |= {"every": args.save_every or steps, "on_steps": on_steps, "on_epoch": on_epoch}
    options |= {"saver": checkpoint.Saver(args.out, config=config, share=args.save_share)}
    state, _ = train.fit(loss_fn, optimizer, state, training, num_classes=10, **options)
    figures = {name: float(np.asarray(m)) for name, m in train.evaluate(loss_fn, state.params, test).items()}
    say(f"test accuracy {figures['accuracy']:.4f}")
    return figures


def launch(args: argparse.Namespace, argv: list[str]) -> int:
    """Starts `--processes` processes of this program on this machine and waits for them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "examples.train_distributed", *argv, "--coordinator", coordinator]
    children: list[subprocess.Popen] = []
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append([child.terminate() for child in children]))
    for i in range(args.processes):
        children.append(subprocess.Popen([*command, "--process-id", str(i)]))
        if asked:
            children[-1].terminate()
    try:
        while all(child.poll() in (None, 0) for child in children) and any(child.poll() is None for child in children):
            time.sleep(0.05)
        deadline = time.monotonic() + GRACE
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if not any(code is None or code < 0 or code == LOST for code in codes):
        return max(code or 0 for code in codes)
    # A survivor raises an error, is aborted by JAX (SIGABRT), or keeps waiting. A killed process is the lost one; if
    # none was killed, a silent one is.
    killed = {i: signal.Signals(-code).name for i, code in enumerate(codes) if code is not None and code < 0}
    lost = [f"process {i} ({name})" for i, name in killed.items() if name != "SIGABRT"]
    lost = lost or [f"process {i} (silent)" for i, code in enumerate(codes) if code is None] or ["a process"]
    print(f"error: lost {', '.join(lost)}; continue with --resume", file=sys.stderr)
    return LOST


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    from fcfunc.sharding import MODES

    parser = argparse.ArgumentParser(prog="train_distributed", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", choices=("fashion-mnist", "digits"), default="fashion-mnist")
    add(
        "--dims", type=lambda text: [int(n) for n in text.split(",")], help="widths (default: two hidden layers of 512)"
    )
    add("--mode", choices=tuple(MODES), default="data", help="how the params are sharded (default: data)")
    add("--model", type=int, default=1, help="devices over which each layer is sharded (default: 1)")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=512, help="examples per step, over all devices (default: 512)")
    add("--accumulate", type=int, default=1, help="microbatches per step, for gradient accumulation (default: 1)")
    add("--learning-rate", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--out", default="runs/distributed", help="folder for the checkpoints, shared by all processes")
    add(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="save, and check for SIGTERM, also every STEPS steps within an epoch (default: only at its end)",
    )
    add("--save-share", type=float, default=0.02, help="the largest part of the time spent on saving, in one process "
        "(default: 0.02)")  # fmt: skip
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--processes", type=int, default=1, help="number of processes, started here unless --process-id is given")
    add("--process-id", type=int, help="index of this process, 0 to N - 1, if you start them yourself")
    add("--coordinator", metavar="HOST:PORT", help="address at which the others reach process 0")
    add("--bind", metavar="ADDRESS:PORT", help="address at which process 0 listens (default: loopback, this machine "
        "only); anyone who can reach the port can stop the run or read from it, so use a trusted network")  # fmt: skip
    add("--cluster", action="store_true", help="started by Slurm, Open MPI or Kubernetes (jax.distributed.initialize)")
    add(
        "--lost-after",
        type=int,
        default=20,
        metavar="SECONDS",
        help="when a silent process counts as lost (default: 20)",
    )
    parser.error = usage_error
    args = parser.parse_args(argv)
    by_hand = args.process_id is not None
    if by_hand != (args.coordinator is not None) or (by_hand and args.processes < 2):
        usage_error("--process-id, --coordinator HOST:PORT and --processes of at least 2 must be given together")
    if args.save_every is not None and args.save_every < 1:
        usage_error(f"--save-every must be at least 1, got {args.save_every}")
    if by_hand and not 0 <= args.process_id < args.processes:
        usage_error(f"--process-id must be between 0 and {args.processes - 1}, got {args.process_id}")
    return args


def usage_error(message: str):
    """Raises the error for one line, instead of argparse's full usage."""
    raise ValueError(f"{message} (see --help)")


def run(argv: list[str]) -> int:
    """`main` for a shell: an error is one line and exit status 2, 3 if another process was lost, 4 after SIGTERM."""
    where, status = "", 2
    try:
        args = parse(argv)
        if args.processes > 1 and args.process_id is None and not args.cluster:
            return launch(args, argv)
        where = f" (process {args.process_id})" if args.process_id is not None else ""
        main(args)
        return 0
    except Terminated as e:
        if not where or where.endswith(" 0)"):
            print(e, file=sys.stderr, flush=True)
        return TERMINATED
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError) as e:
        message = " ".join(str(e).split()) or type(e).__name__
    except RuntimeError as e:  # raised by a collective when a connection breaks
        message, status = f"another process was lost, or a device failed: {' '.join(str(e).split())[:160]}", LOST
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    # Not sys.exit, because JAX would wait for the other processes, which may be gone.
    os._exit(status)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
