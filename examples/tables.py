"""Converts text and missing values in a CSV file to numbers, with a scikit-learn pipeline that can be saved."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import sklearn.compose
import sklearn.impute
import sklearn.pipeline
import sklearn.preprocessing

MAX_CATEGORIES = 100
"""The largest number of one-hot columns per text column; rarer values share one of them."""


class MixedTable(NamedTuple):
    """Features as a DataFrame of numbers and strings, targets `y`, and the names of the classes, if any."""

    features: pd.DataFrame
    y: np.ndarray
    classes: list[str] | None


def read(path: Path, target: str | None) -> MixedTable | None:
    """Reads a CSV file with a header; an empty cell, NA, NaN or ? is a missing value.

    A column is numeric if most of its values are numbers, and text otherwise. Returns None if all values are numbers
    and none is missing, or if the file cannot be parsed; `fcfunc.data.read_csv` has better messages for these.
    """
    try:
        cells = pd.read_csv(path, dtype=str, na_values=["?"], skipinitialspace=True)
    except ValueError:
        return None
    names = list(cells.columns)
    if len(names) < 2 or not len(cells) or (target is not None and target not in names):
        return None
    target = names[-1] if target is None else target
    values = cells.pop(target)
    numbers = {name: pd.to_numeric(cells[name], errors="coerce") for name in cells}
    is_text = {name: numbers[name].notna().sum() < 0.5 * cells[name].notna().sum() for name in cells}
    if not any(is_text.values()) and not cells.isna().to_numpy().any():
        return None
    for name in cells:
        stray = np.flatnonzero(numbers[name].isna() & cells[name].notna())
        if len(stray) and not is_text[name]:
            cell = cells[name].iloc[stray[0]]
            raise ValueError(
                f"{path}, row {stray[0] + 1}, {name}: expected a number, as in most rows, got {cell[:40]!r}"
            )
    if values.isna().any():
        raise ValueError(f"{path}, row {np.flatnonzero(values.isna())[0] + 1}: no target in {target!r}")
    features = pd.DataFrame({name: cells[name] if is_text[name] else numbers[name] for name in cells})
    y = pd.to_numeric(values, errors="coerce")
    if y.isna().any():
        classes, indices = np.unique(values.to_numpy(str), return_inverse=True)
        return MixedTable(features, indices.astype(np.int32), classes.tolist())
    return MixedTable(features, y.to_numpy(np.int32 if (y % 1 == 0).all() and abs(y).max() < 1e9 else np.float32), None)


def preprocessing(features: pd.DataFrame) -> sklearn.compose.ColumnTransformer:
    """Numbers: impute the median, mark missing values in a column, standardize. Text: one-hot columns."""
    numeric = sklearn.pipeline.make_pipeline(
        sklearn.impute.SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        sklearn.preprocessing.StandardScaler(),
    )
    one_hot = sklearn.preprocessing.OneHotEncoder(
        handle_unknown="infrequent_if_exist", max_categories=MAX_CATEGORIES, sparse_output=False, dtype=np.float32
    )
    text = [name for name in features if not pd.api.types.is_numeric_dtype(features[name])]
    numbers = [name for name in features if name not in text]
    return sklearn.compose.ColumnTransformer([("numbers", numeric, numbers), ("text", one_hot, text)])
