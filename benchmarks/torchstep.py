"""Dense torch as a step that our epoch loop trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mest_compile.operators.optimizers.sgd import SGD
from mest_compile.runtime import checkpoint


class TorchStep:
    """Dense torch with the interface of a compiled step, so that one epoch loop trains both."""

    def __init__(self, model: torch.nn.Module, shape: tuple[int, ...], classes: int, lr: float):
        torch.set_num_threads(1)
        self.input_shape, self.batch, self.classes = shape, shape[0], classes
        self.whole_batches = True  # as its runs were: of those alone
        self.reading = None
        self.optimizer, self.asked_lr = SGD(lr=lr), None
        self._model = model.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)

    def _images(self, images: np.ndarray) -> Any:
        return torch.from_numpy(images).to(memory_format=torch.channels_last)

    def __call__(self, images: np.ndarray, labels: np.ndarray, lr: float, ahead: Any = None) -> SimpleNamespace:
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.zero_grad()
        answers, wanted = self._model.train()(self._images(images)), torch.from_numpy(labels)
        loss = torch.nn.functional.cross_entropy(answers, wanted)
        loss.backward()
        self._optimizer.step()
        return SimpleNamespace(loss=loss.item(), correct=(answers.argmax(1) == wanted).numpy())

    def predict(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._model.eval()(self._images(images)).numpy()

    def save(self, path: Path, extra: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        momentum = {
            name: self._optimizer.state[parameter]["momentum_buffer"].numpy()
            for name, parameter in self._model.named_parameters()
            if parameter in self._optimizer.state
        }
        checkpoint.write(
            path,
            {
                **{f"model/{name}": value.numpy() for name, value in self._model.state_dict().items()},
                **{f"momentum/{name}": value for name, value in momentum.items()},
            },
            {"extra": dict(extra)},
        )

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        arrays, facts = checkpoint.read(path)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._model.load_state_dict(
            {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        )
        for name, parameter in self._model.named_parameters():
            if f"momentum/{name}" in tensors:
                self._optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum/{name}"].clone(
                    memory_format=torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                )
        return facts["extra"], {}

    def describe(self) -> dict[str, Any]:
        return {"sparsity": {}}

    def not_finite(self) -> list[str]:
        return [name for name, value in self._model.state_dict().items() if not bool(torch.isfinite(value).all())]

    def check_room(self, grow_to: float) -> None:
        pass

    def masks(self) -> dict[str, np.ndarray]:
        return {}

    def sparsity(self) -> dict[str, float]:
        return {}

    def memory(self) -> dict[str, int]:
        return {}
