"""Trains the network of the draw-a-digit page with the program of `make train`, and writes its parameters."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fcfunc import params_file


def write(path: Path) -> None:
    """Writes a JavaScript file that assigns the parameters; a page opened from a folder cannot fetch JSON."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.train_classifier", "--out", f"{folder}/digits"]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
        saved, _ = params_file.load(Path(folder) / "digits" / "params.safetensors")
    layers = [
        {name: np.round(np.asarray(a, np.float64), 5).tolist() for name, a in layer.items()}
        for layer in saved["layers"]
    ]
    path.write_text(f"const DIGIT_PARAMS = {json.dumps(layers, separators=(',', ':'))};\n")
