"""Item embeddings that start from texts' vectors: their principal components, on the scale of a random table (ours).

A language model's vectors of the titles put alike titles next to each other before the encoder has seen an event, and
an item without training events gets a row that means something. ``language_models.text_embeddings`` makes the vectors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from userllm.errors import UserError
from userllm.tensor_file import save_tensors


class TextStart:
    """The projection [D] -> [d]: minus the mean, onto principal components, scaled.

    mean [D], components [D, d] (orthogonal columns of one length, zeros where there are not that many).
    """

    def __init__(self, mean: Tensor, components: Tensor):
        self.mean, self.components = mean, components

    @classmethod
    def fit(cls, vectors: Tensor, width: int) -> TextStart:
        """From the catalogue's vectors [items, D]; its rows will have the standard deviation of a random table.

        Components keep their variances (nothing is whitened), so distances between titles are kept as far as ``width``
        goes. Raises UserError where all vectors are the same.
        """
        mean = vectors.double().mean(0)
        _, spread, directions = torch.linalg.svd(vectors.double() - mean, full_matrices=False)
        kept = int((spread[:width] > 1e-6 * spread[0]).sum())
        if kept == 0:
            raise UserError(
                "encoder.item_start: every title has the same vector; start from random embeddings"
            )
        directions = directions[:kept]
        signs = directions.gather(
            1, directions.abs().argmax(1, keepdim=True)
        ).sign()  # a sign that is always the same
        components = torch.zeros(vectors.shape[1], width, dtype=torch.double)
        components[:, :kept] = (directions * signs).T
        std = ((vectors.double() - mean) @ components).std(correction=0)
        return cls(mean.float(), (components * (width**-0.5 / std)).float())

    def rows(self, vectors: Tensor) -> Tensor:
        """Embeddings [..., d] for vectors [..., D]: of the catalogue's titles or of new ones."""
        return (vectors - self.mean) @ self.components

    def save(self, file: Path) -> None:
        """Write as safetensors."""
        save_tensors({"mean": self.mean, "components": self.components}, file)

    @classmethod
    def load(cls, file: Path) -> TextStart:
        """Raises UserError where the file is missing or holds something else."""
        try:
            return cls(**load_file(file))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(
                f"{file}: not the start of item embeddings ({error}); pretrain the encoder again"
            ) from error
