"""From a forward graph to the calls of a training step: fusing, lowering, reverse pass, memory plan, Relax module."""
