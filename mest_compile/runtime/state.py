"""What a step holds between calls, in the order that its kernels want: weights, optimizer state and index arrays of the
live units, statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mest_compile.base.errors import StateError
from mest_compile.ir.graph import COUNTER
from mest_compile.ir.program import Buffer, Program
from mest_compile.operators.batch_norm import BatchNormRunning
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.operators.layers.turning import TURNED
from mest_compile.operators.layers.values import carry_over, cell_type, cells_of, gather_units, merge, scatter_units
from mest_compile.runtime.runner import Runner
from mest_compile.sparsity.layer import Layer


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What a layer is to hold under other masks, ready to be written.

    cells, places  as `HeldState` has them
    order          where each cell of the value array lies in the grid
    arrays         name -> array: values, gradients, the optimizer's states, index
    """

    name: str
    cells: np.ndarray
    places: np.ndarray
    order: np.ndarray
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies of all that a step's state consists of, for another step of the same model.

    orders  weight name -> where each cell of the layer's arrays lies in the grid
    arrays  name -> array: the layers' own
    dense   suffix as `HeldState.collect` has it -> torch name -> array of what is in no layer
    kept    as `HeldState` has it
    """

    orders: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    dense: dict[str, dict[str, np.ndarray]]
    kept: dict[str, np.ndarray]


class HeldState:
    """The arrays of one step on a runner, and their translation to torch's names and shapes and back.

    held   name -> buffer of all arrays that outlive a call
    places weight name -> where in the value array each live cell stands, of the layers that have a mask
    kept   torch name -> what no operator of the model uses, in its own type: it stays in this process as it is
    """

    def __init__(
        self,
        programs: Sequence[Program],
        layers: Mapping[str, Layer],
        shapes: Mapping[str, tuple[int, ...]],
        runner: Runner,
    ):
        """programs: of the step, the training program first; shapes: torch name -> shape."""
        self.held: dict[str, Buffer] = {buffer.name: buffer for program in programs for buffer in program.held()}
        self.places: dict[str, np.ndarray] = {}
        self._cells: dict[str, np.ndarray] = {}  # in the smallest type that has room for them
        shared = self.held.get(TURNED)
        self._turned = dict.fromkeys(shared.sharers if shared else (), 0)  # weight name -> elements that it turns
        self._layers, self._shapes = layers, shapes
        self._index = {name: FAMILIES.find(layer.kernels).indexer(layer, programs[0]) for name, layer in layers.items()}
        self._dense = [buffer for buffer in self.held.values() if buffer.parts]
        used = {*layers, *(part for buffer in self._dense for part in buffer.parts)}
        self.kept: dict[str, np.ndarray] = {
            name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in used
        }
        self._counters = _counters(programs[0], shapes)
        self.start_on(runner)

    def start_on(self, runner: Runner) -> None:
        """Takes another runner, whose arrays are all 0 and which has no masks yet."""
        for buffer in self.held.values():
            if buffer.elems is not None:
                runner.put(buffer.name, np.zeros(buffer.elems, buffer.dtype))
        self.places.clear()
        self._cells.clear()
        self._turned, self._room = dict.fromkeys(self._turned, 0), 0
        self._runner = runner

    def put(self, name: str, array: np.ndarray) -> None:
        self._runner.put(name, array)

    def get(self, name: str) -> np.ndarray:
        return self._runner.get(name)

    def count_batches(self, count: int) -> None:
        """Adds to the number of batches that each BatchNorm has taken into its statistics, if torch keeps it."""
        for name in self._counters:
            self.kept[name] += count

    def own(self) -> list[str]:
        """Names of what the state consists of: all else is made from it, or is a batch's."""
        return [
            name
            for name, buffer in self.held.items()
            if buffer.kind in ("values", "optimizer", "gradients") and buffer.role != "transposed"
        ]

    def parts(self, name: str) -> list[str]:
        """Names of the layer's own arrays, all in the order of its values: values, gradients, the optimizer's
        states."""
        return [part for part in self.own() if self.held[part].layer == name]

    # Masks.

    def cells(self, name: str) -> np.ndarray:
        """Where the layer's live cells lie in the grid, (live,) int32, ascending: its mask."""
        return self._cells[name].astype(np.int32)

    def keep(self, name: str) -> np.ndarray:
        """The layer's mask, a bool array of its scheme's grid."""
        layer = self._layers[name]
        keep = np.zeros(layer.scheme.grid(layer.spec), bool)
        keep.ravel()[self._cells[name]] = True
        return keep

    def mask(self, name: str) -> np.ndarray:
        """The same of every weight, in torch's shape."""
        layer = self._layers[name]
        return layer.scheme.expand(layer.spec, self.keep(name)).reshape(self._shapes[name])

    def order(self, name: str) -> np.ndarray:
        """Where each cell of the value array lies in the grid."""
        cells = self.cells(name)
        return cells.take(self._index[name](cells).sort)

    def arranged(
        self, name: str, cells: np.ndarray, places: np.ndarray | None = None, start: np.ndarray | None = None
    ) -> Arrangement:
        """What makes `cells`, ascending, the layer's live ones: index arrays, and values, gradients and optimizer state
        of those that stay.


        places  where in the value array each stands now, -1 for new ones; None: all are new
        start   (new cells, weights of a cell) float32: what the new ones start at; None: 0
        """
        index = self._index[name](cells)
        elems = self._layers[name].scheme.cell_elems(self._layers[name].spec)
        stood = None if places is None else places.take(index.sort)
        arrays = {
            held: array for part, array in index.arrays.items() if (held := f"{name}:{part}") in self.held
        }  # what only an update would read is not held where the weight stays as it is
        for part in self.parts(name):
            arrays[part] = (
                np.zeros(len(index.sort) * elems, np.float32)
                if stood is None
                else carry_over(self.get(part).reshape(-1, elems), stood)
            )
        if start is not None and places is not None and stood is not None:
            values, new = arrays[name].reshape(-1, elems), stood < 0
            values[new] = start[(np.cumsum(places < 0) - 1).take(index.sort)[new]]
        return Arrangement(name, cells, index.places, cells.take(index.sort), arrays)

    def ordered(self, name: str, order: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Arrangement:
        """What makes the cells at `order` of the grid the layer's live ones. arrays: the layer's own, in that order;
        those that are not there are 0."""
        layer = self._layers[name]
        alive = np.zeros(layer.scheme.grid(layer.spec), bool)
        alive.ravel()[order] = True
        arranged = self.arranged(name, cells_of(alive))
        if not np.array_equal(order, arranged.order):  # kernels that want it otherwise
            sort = np.argsort(order, kind="stable")
            there = sort[np.searchsorted(order, arranged.order, sorter=sort)]
            arrays = {part: array.reshape(len(order), -1)[there] for part, array in arrays.items()}
        arranged.arrays.update(arrays)
        return arranged

    def snapshot(self, states: Sequence[str]) -> Snapshot:
        """states: names of what the optimizer keeps."""
        return Snapshot(
            {name: self.order(name) for name in self.places},
            {part: self.get(part) for name in self.places for part in self.parts(name)},
            {suffix: dict(self._collect_dense(suffix)) for suffix in ("", ":gradient", *(f":{one}" for one in states))},
            {name: array.copy() for name, array in self.kept.items()},
        )

    def take(self, snapshot: Snapshot) -> None:
        """Makes the state that of a snapshot, as far as this step has places for it; what it lacks is 0."""
        for name, order in snapshot.orders.items():
            parts = {part: snapshot.arrays[part] for part in self.parts(name) if part in snapshot.arrays}
            self.install(self.ordered(name, order, parts))
        for suffix, arrays in snapshot.dense.items():
            for buffer in self._dense:
                if buffer.name + suffix in self.held and arrays.keys() >= set(buffer.parts):
                    self.put(buffer.name + suffix, np.concatenate([arrays[part].ravel() for part in buffer.parts]))
        self.kept = {name: snapshot.kept[name] for name in self.kept}

    def moved(self, name: str, stay: np.ndarray, new: np.ndarray, start: np.ndarray | None = None) -> Arrangement:
        """`arranged` of those of `cells` that stay, told by their places in that list, and of new ones, of a unit that
        died and was drawn again as well.
        """
        return self.arranged(name, *merge(self.cells(name).take(stay), self.places[name].take(stay), new), start)

    def install(self, arrangement: Arrangement) -> None:
        """Makes it what the layer holds."""
        name = arrangement.name
        layer = self._layers[name]
        self._cells[name] = arrangement.cells.astype(cell_type(layer.scheme.grid(layer.spec)))
        self.places[name] = arrangement.places
        if name in self._turned:
            made = arrangement.arrays
            self._turned[name] = made.get(f"{name}:transposed_from", made[name]).size
        most = max(self._turned.values(), default=0)
        self._make_room(max(most, self._room))  # first: what kernels turn next needs it
        self.write(arrangement.arrays)
        self._make_room(most)

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts arrays by name, and brings up to date what is made from them."""
        for name, array in arrays.items():
            self.put(name, array)
        for name in self._layers:
            if name in arrays:
                self.transpose(name)

    def transpose(self, name: str) -> None:
        """Brings the copy of the values that the input gradient reads up to date."""
        if f"{name}:transposed" not in self.held:
            return
        layer = self._layers[name]
        index = self._index[name](self.cells(name)).arrays
        if "transposed_from" in index:
            self.put(f"{name}:transposed", self.get(name)[index["transposed_from"]])
        elif "permutation" in index:
            rows, sources = layer.scheme.block(layer.spec)
            values: np.ndarray = (
                self.get(name).reshape(-1, sources, rows).transpose(0, 2, 1).reshape(-1, rows * sources)
            )
            if rows * sources == 1:
                values = values[:, 0]  # NumPy moves plain numbers three times as fast as rows of one
            turned = np.empty_like(values)
            turned[index["permutation"]] = values
            self.put(f"{name}:transposed", turned)

    def _make_room(self, elems: int) -> None:
        """Lets the array for values that kernels turn have so many."""
        if elems != self._room:
            self.put(TURNED, np.zeros(elems, np.float32))
            self._room = elems

    # Torch's names and shapes.

    def check(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises StateError when names or shapes are not the model's."""
        missing, foreign = sorted(self._shapes.keys() - state.keys()), sorted(state.keys() - self._shapes.keys())
        if missing or foreign:
            raise StateError(
                f"the state does not fit the model: missing {missing[:3] or 'none'}, unknown {foreign[:3] or 'none'}"
            )
        for name, shape in self._shapes.items():
            if tuple(state[name].shape) != tuple(shape):
                raise StateError(f"{name}: the state has shape {tuple(state[name].shape)}, the model {tuple(shape)}")

    def check_dead(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises StateError when weights are not 0 where the masks are dead."""
        for name, layer in self._layers.items():
            wrong = np.count_nonzero(as_conv(state[name])[~layer.scheme.expand(layer.spec, self.keep(name))])
            if wrong:
                raise StateError(
                    f"{name}: {wrong} weights are not 0 where the mask is dead; call set_masks first or zero them"
                )

    def filling(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What to write to set every parameter and statistic; of weights what the masks keep."""
        arrays = {
            buffer.name: np.concatenate([np.asarray(state[part], np.float32).ravel() for part in buffer.parts])
            for buffer in self._dense
        }
        for name, layer in self._layers.items():
            arrays[name] = gather_units(as_conv(state[name]), self.order(name), layer.scheme.grid(layer.spec))
        return arrays

    def unused(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copies of what `kept` is to be of a state."""
        return {name: np.array(state[name]) for name in self.kept}

    def collect(self, suffix: str) -> dict[str, np.ndarray]:
        """Every parameter's array of that suffix ("" weights, ":gradient", ":" and a state of the optimizer) by torch
        name and shape, 0 at dead weights. Frozen parameters have weights only.
        """
        found = {} if suffix else {name: array.copy() for name, array in self.kept.items()}
        found |= self._collect_dense(suffix)
        for name, layer in self._layers.items():
            if name + suffix not in self.held:
                continue
            grid = layer.scheme.grid(layer.spec)
            values = (
                self.get(name + suffix).reshape(-1, layer.scheme.cell_elems(layer.spec)).take(self.places[name], axis=0)
            )
            dense = scatter_units(values, self._cells[name], grid, layer.spec.weight_shape)
            found[name] = dense.reshape(self._shapes[name])
        return found

    def _collect_dense(self, suffix: str) -> Iterator[tuple[str, np.ndarray]]:
        """(torch name, array) of that suffix of what is in no layer."""
        for buffer in self._dense:
            if buffer.name + suffix in self.held:
                flat, start = self.get(buffer.name + suffix), 0
                for part in buffer.parts:
                    size = int(np.prod(self._shapes[part]))
                    yield part, flat[start : start + size].reshape(self._shapes[part]).copy()
                    start += size


def _counters(train: Program, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the counters that a call of the training program raises: beside the statistics that it moves."""
    moved = [call.buffers[1].parts[0] for call in train.calls if isinstance(call.problem, BatchNormRunning)]
    found = [".".join(filter(None, [name.rpartition(".")[0], COUNTER])) for name in moved]
    return [name for name in found if shapes.get(name) == ()]


def as_conv(weight: np.ndarray) -> np.ndarray:
    """A linear weight (out, in) as (out, in, 1, 1)."""
    return weight.reshape(*weight.shape, 1, 1) if weight.ndim == 2 else weight
