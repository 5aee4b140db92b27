# SPDX-License-Identifier: MIT
"""Array types used in signatures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
