"""The progress bar of `fcfunc.train.fit`."""

import time

import jax
import jax.numpy as jnp

BAR = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"


class ProgressBar:
    """Epochs done, with fractions: the compiled epoch reports its steps, the host's loop the metrics."""

    def __init__(self, epochs: int, steps: int, first_step: int):
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError("fit: progress=True needs tqdm; pip install 'fcfunc[progress]'") from None
        self.bar = tqdm(total=epochs, unit="epoch", dynamic_ncols=True, bar_format=BAR)
        self.steps, self.first_step = steps, first_step
        self.epochs, self.started, self.drawn = 0, time.perf_counter(), 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def every(self):
        """After how many steps the next epoch shall report: five times a second, as fast as the last epochs were."""
        rate = self.epochs * self.steps / (time.perf_counter() - self.started)
        return jnp.int32(max(1, min(rate / 5, self.steps)))

    def report(self, every, step):
        """In the compiled epoch: has the host move the bar, where a report is due; nobody waits for it."""
        due = (step - self.first_step) % every == 0
        jax.lax.cond(due, lambda step: jax.debug.callback(self.move, step), lambda step: None, step)

    def move(self, step):
        """On the host: moves the bar to a step."""
        now = time.perf_counter()
        if now - self.drawn > 0.1:  # the first epoch reports each step
            self.drawn = now
            self.bar.n = round((int(step) - self.first_step) / self.steps, 2)
            self.bar.refresh()

    def show(self, record: dict[str, float]):
        """Moves the bar to the end of an epoch, with its metrics."""
        jax.effects_barrier()
        self.epochs += 1
        self.bar.n = self.epochs
        shown = {name: f"{value:.4f}" for name, value in record.items() if name not in ("epoch", "step", "seconds")}
        self.bar.set_postfix(shown)
