"""DP-SGD over privacy units, on Opacus' ``DPOptimizer``.

One step: a Poisson sample of units arrives in one or more physical micro-batches. For each,
`DpSgd.accumulate` runs one backward pass, adds up the per-sample gradients of each unit, scales each
unit's sum to the norm ``clip`` and adds it to the step's sum. `DpSgd.release` adds Gaussian noise and
hands out the noisy sum (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016).

Parameters may be clipped in groups. With norms ``C_g`` and shares ``f_g`` that add up to 1, group g
gets noise of standard deviation ``sigma C_g / sqrt(f_g)``: in units of its noise one unit moves group
g by at most ``sqrt(f_g) / sigma`` and everything together by ``1 / sigma``. It is one Gaussian
mechanism of multiplier ``sigma``, and is accounted as that.

Opacus' ``DPOptimizer`` is built directly, without ``make_private``, which would want a data loader
and an accountant of its own. It stays in charge of the order of a step, of skipped (micro-batch)
steps and of its guard against gradients used twice; clipping and noise are the two methods it offers
to override.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from silotune.errors import SelfCheckFailed
from silotune.privacy.clipping import Attached
from silotune.privacy.layers import Stack, as_rows, shaped_as, unit_norms, weighted_sum
from silotune.privacy.noise import NoiseSource, noise_is_plausible

_log = logging.getLogger(__name__)

# Units are scaled to this part of the clip norm C. A norm is wrong by less than 2^-30 of itself (see
# `row_norms`, up to 2^35 numbers in a group), a factor and a product by 2^-52 each, and adding up U
# units rounds by less than U^2 2^-53 C: together below 2^-19 C, for up to 2^16 units in a step.
_MARGIN = 1.0 - 2.0**-19


@dataclass(frozen=True)
class ClipGroup:
    """Parameters that are clipped together.

    Attributes
    ----------
    name : str
    parameters : tuple[nn.Parameter, ...]
    clip : float
        Bound on a unit's L2 norm over the group.
    share : float
        The group's part of the squared sensitivity; all shares add up to 1.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    clip: float
    share: float = 1.0

    def noise_std(self, sigma: float) -> float:
        """Standard deviation of the group's noise for a noise multiplier."""
        return sigma * self.clip / math.sqrt(self.share)


class _UnitClipper(DPOptimizer):  # type: ignore[misc]
    """Opacus' step with clipping per unit and group, and noise from a `NoiseSource`."""

    def __init__(
        self,
        groups: Sequence[ClipGroup],
        *,
        sigma: float,
        noise: NoiseSource | None,
        thorough: bool,
    ) -> None:
        parameters = [p for group in groups for p in group.parameters]
        super().__init__(
            # Never stepped: the noisy sum leaves as it is, the coordinator's optimizer uses it.
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=sigma,
            max_grad_norm=math.hypot(*(group.clip for group in groups)),
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.groups = tuple(groups)
        self.noise = noise
        self.units: Tensor | None = None
        self.n_units = 0
        self.thorough = thorough

    def clip_and_accumulate(self) -> None:
        """Add each unit's clipped gradient to ``p.summed_grad``: those of all units, or of none.

        A unit with a number that is not finite in any group counts as zero, which is within the clip.
        """
        holders = [cast(Any, p) for group in self.groups for p in group.parameters]
        if not len(holders[0].grad_sample):
            _add_nothing(holders)
            return
        for holder in holders:
            _check_processed_flag(holder.grad_sample)
        samples = {id(holder): self._get_flat_grad_sample(holder) for holder in holders}
        found = [[samples[id(p)] for p in group.parameters] for group in self.groups]
        norms = [unit_norms(each, self.units, self.n_units) for each in found]
        finite = torch.stack([each.isfinite() for each in norms]).all(0)
        sums = [
            total
            for group, each, norm in zip(self.groups, found, norms, strict=True)
            for total in self._clipped(group, each, norm, finite)
        ]
        for holder, flat in zip(holders, sums, strict=True):
            total = shaped_as(holder, flat, samples=samples[id(holder)])
            earlier = holder.summed_grad
            holder.summed_grad = total if earlier is None else earlier + total
            _mark_as_processed(holder.grad_sample)

    def _clipped(
        self, group: ClipGroup, samples: list[Tensor], norms: Tensor, finite: Tensor
    ) -> list[Tensor]:
        """The sum of a group's clipped units, flat, one tensor a parameter."""
        # A zero norm gives infinity here and so a factor of 1.
        factors = (group.clip * _MARGIN / norms).clamp(max=1.0)
        rows, whole = [as_rows(sample) for sample in samples], bool(finite.all())
        if not whole:
            _log.warning("%d units had a gradient that is not finite", int((~finite).sum()))
            factors = torch.where(finite, factors, 0.0)
        factors = self._clipped_again(group, rows, norms, factors)
        weights = factors if self.units is None else factors[self.units]
        usable = None if whole else finite if self.units is None else finite[self.units]
        # Sums are kept in float64. In float32 one unit could change the rounding of all others,
        # and so move the sum by more than the clip norm (Casacuberta et al., CCS 2022).
        return [weighted_sum(row, weights, usable) for row in rows]

    def _clipped_again(
        self, group: ClipGroup, rows: list[Tensor], norms: Tensor, factors: Tensor
    ) -> Tensor:
        """Measure clipped units anew: all in a first batch, then the largest one.

        By the proof of the margin none is above its bound. If one is all the same, something is
        broken: every unit is then measured, and clipped by what was measured. Which units there
        are depends on records, so it can't be a failure that somebody hears of.
        """
        every = range(len(norms))
        chosen = every if self.thorough else [int(norms.nan_to_num(posinf=0.0).argmax())]
        if all(self._length(rows, unit, factors) <= group.clip for unit in chosen):
            return factors
        _log.error("a clipped norm of the %s was above its bound; clipped again", group.name)
        again = [group.clip / max(self._length(rows, unit, factors), group.clip) for unit in every]
        return factors * factors.new_tensor(again) * (1.0 - 2.0**-19)

    def _length(self, rows: list[Tensor], unit: int, factors: Tensor) -> float:
        """Norm of one unit as it enters the sum, by other means than `unit_norms`."""
        if not factors[unit]:
            return 0.0
        squares = 0.0
        for row in rows:
            own = row[unit] if self.units is None else row[self.units == unit].double().sum(0)
            clipped = own.double() * factors[unit]
            squares += float(clipped.dot(clipped))
        return math.sqrt(squares)

    def withdraw(self) -> None:
        """Forget a physical micro-batch that could not be added."""
        self._step_skip_queue.clear()

    def add_noise(self) -> None:
        """Set ``p.grad`` to the noisy sum, and check what was added; leave it without a source."""
        if self.noise is None:
            return
        for group in self.groups:
            std = group.noise_std(self.noise_multiplier)
            holders = [cast(Any, parameter) for parameter in group.parameters]
            for holder in holders:
                _check_processed_flag(holder.summed_grad)
            clean = torch.cat([holder.summed_grad.flatten() for holder in holders])
            _require_finite([clean], f"the gradient sum of the {group.name}")
            noisy = self.noise.add(clean, std).float()
            added = float(torch.linalg.vector_norm(noisy - clean, dtype=torch.float64))
            if not noise_is_plausible((added / std) ** 2, len(clean)):
                raise SelfCheckFailed(f"the noise of the {group.name} is not what was asked for")
            sizes = [parameter.numel() for parameter in group.parameters]
            for holder, part in zip(holders, torch.split(noisy, sizes), strict=True):
                holder.grad = part.view(holder.shape)
                _mark_as_processed(holder.summed_grad)


def _add_nothing(holders: list[Any]) -> None:
    """An empty batch: the sum stays as it is, and is zero where nothing came before."""
    for holder in holders:
        if holder.summed_grad is None:
            holder.summed_grad = torch.zeros_like(holder, dtype=torch.float64)


class DpSgd:
    """Clipped, noisy sums of per-unit gradients.

    Parameters
    ----------
    attached : Attached
        The private attachment of the model.
    groups : Sequence[ClipGroup]
        Disjoint groups of its parameters, shares adding up to 1. Parameters in no group are left
        alone, e.g. the adapter while only the head is trained.
    sigma : float
        Noise multiplier, above 0.
    noise : NoiseSource or None
        None if `release` is to give clipped sums without noise, which must not leave before
        `silotune.privacy.secagg.encoding` has added some.

    Attributes
    ----------
    parameters : tuple[nn.Parameter, ...]
        In the order of the sums that `release` returns: group after group.

    Raises
    ------
    ValueError
        Groups overlap, have unknown parameters or shares that don't add up to 1, or a number is
        out of range.
    """

    def __init__(
        self,
        attached: Attached,
        groups: Sequence[ClipGroup],
        *,
        sigma: float,
        noise: NoiseSource | None,
    ) -> None:
        if not attached.private:
            raise ValueError("DpSgd needs attach(..., private=True)")
        _check_groups(attached, groups)
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be a positive number, not {sigma}")
        self.parameters = tuple(p for group in groups for p in group.parameters)
        self._attached = attached
        self._failed = False
        attached.user = self
        self._clipper = _UnitClipper(
            groups, sigma=sigma, noise=noise, thorough=not attached.norms_checked
        )

    def accumulate(
        self, losses: Tensor, *, units: Tensor | None = None, n_units: int | None = None
    ) -> None:
        """One backward pass; clip what each unit adds, and add it to the step's sum.

        Parameters
        ----------
        losses : Tensor
            One loss a record, shape ``[n]``; each may depend on its own sequences only.
        units : Tensor, optional
            Unit of each sequence that the model was given, int64 ``[m]``, values in
            ``range(n_units)``: of several, where a record takes several. None if each is a unit of
            its own. All of a unit's sequences of the step must be in this one call.
        n_units : int, optional
            Number of units, with `units`.

        A unit whose gradient is not finite adds nothing. An error leaves the sum as it was: the step
        can go on without this micro-batch.

        Raises
        ------
        SelfCheckFailed
            A gradient is missing, or came past the per-sample rule.
        """
        self._require_sound()
        if _is_empty(losses, units, n_units):
            return
        try:
            self._add(losses, units, n_units)
        except BaseException:
            self._clipper.withdraw()
            self._attached.clear()
            raise

    def _add(self, losses: Tensor, units: Tensor | None, n_units: int | None) -> None:
        clipper = self._clipper
        self._attached.clear()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self._attached.check_gradients(self.parameters, len(losses if units is None else units))
        if units is not None and int(torch.bincount(units).max()) == 1:
            units = None  # every sequence is a unit of its own, whatever its number
        clipper.units, clipper.n_units = units, n_units or 0
        # Opacus' way of a physical micro-batch: a step that is skipped after clipping.
        clipper.signal_skip_step(do_skip=True)
        clipper.pre_step()
        clipper.zero_grad(set_to_none=True)
        self._attached.clear()
        self._attached.norms_checked, clipper.thorough = True, False

    def release(self) -> list[Tensor]:
        """The noisy sum of the step, and start the next one.

        An empty Poisson batch, with nothing accumulated, gives noise alone.

        Returns
        -------
        list[Tensor]
            Float32, shapes and order of `parameters`; float64 and without noise if the engine has no
            source of it.

        Raises
        ------
        SelfCheckFailed
            A sum is not finite, or the noise added is not of the asked standard deviation (false
            alarms: at most 1e-9 a group and step).
        """
        self._require_sound()
        clipper, self._failed = self._clipper, True
        clipper.units = None
        for parameter in self.parameters:
            cast(Any, parameter).grad_sample = parameter.new_zeros((0, *parameter.shape))
        clipper.signal_skip_step(do_skip=False)
        clipper.pre_step()
        name = "summed_grad" if clipper.noise is None else "grad"
        sums = [cast(Tensor, getattr(p, name)) for p in self.parameters]
        _require_finite(sums, "the gradient sum")
        clipper.zero_grad(set_to_none=True)
        self._failed = False
        return sums

    def _require_sound(self) -> None:
        if self._attached.user is not self:
            # Sums are kept on the parameters: two engines at once would mix them.
            raise SelfCheckFailed("another engine was made for this model in the middle of a step")
        if self._failed:
            raise SelfCheckFailed("an earlier check of this step failed; nothing can be released")


class PlainSgd:
    """Sums of gradients without clipping or noise: `DpSgd`'s non-private twin.

    Parameters
    ----------
    attached : Attached
        The non-private attachment of the model.
    parameters : Sequence[nn.Parameter], optional
        What to sum, all trained parameters by default.
    """

    def __init__(
        self, attached: Attached, parameters: Sequence[nn.Parameter] | None = None
    ) -> None:
        if attached.private:
            raise ValueError("PlainSgd needs attach(..., private=False)")
        self.parameters = tuple(attached.parameters.values() if parameters is None else parameters)
        self._attached = attached
        attached.clear()

    def accumulate(
        self, losses: Tensor, *, units: Tensor | None = None, n_units: int | None = None
    ) -> None:
        """One backward pass, added to the step's sum; `units` make no difference here."""
        if not _is_empty(losses, units, n_units):
            losses.sum().backward()  # type: ignore[no-untyped-call]

    def release(self) -> list[Tensor]:
        """The sum of the step, zero where nothing was accumulated, and start the next one.

        Raises
        ------
        SelfCheckFailed
            A sum is not finite.
        """
        sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        _require_finite(sums, "the gradient sum")
        self._attached.clear()
        return sums


class StackedSgd:
    """`PlainSgd` for several members at once, each with parameters of its own, in one pass.

    Frozen weights are the same for all of them, so that one pass through the model serves all; what is
    trained is stacked, and every sequence goes through the values of its member. The sum of all losses
    gives each member the gradients that it would have alone, up to rounding.

    Parameters
    ----------
    attached : Attached
        The non-private attachment of the model.
    values : Mapping[int, Tensor]
        Values of every trained parameter, by its ``id``: ``[members, *shape]``.
    parameters : Sequence[nn.Parameter]
        What to sum; the others stay as they are.

    Attributes
    ----------
    parameters : tuple[Tensor, ...]
        The stacked values of what is summed.
    """

    def __init__(
        self,
        attached: Attached,
        values: Mapping[int, Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        if attached.private:
            raise ValueError("StackedSgd needs attach(..., private=False)")
        self._attached, self._values = attached, values
        self.parameters = tuple(values[id(p)].requires_grad_() for p in parameters)

    @contextmanager
    def members(self, of: Tensor) -> Iterator[None]:
        """Have the model compute with each sequence's own values; `of` says whose each is."""
        self._attached.stack = Stack(self._values, of)
        try:
            yield
        finally:
            self._attached.stack = None

    def accumulate(self, losses: Tensor) -> None:
        """One backward pass, added to the step's sums."""
        losses.sum().backward()  # type: ignore[no-untyped-call]

    def release(self) -> list[Tensor]:
        """The members' sums of the step, ``[members, *shape]``, finite or not; start the next one."""
        sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return sums


def _check_groups(attached: Attached, groups: Sequence[ClipGroup]) -> None:
    parameters = [p for group in groups for p in group.parameters]
    known = {id(p) for p in attached.parameters.values()}
    if not parameters or not all(group.parameters for group in groups):
        raise ValueError("a clip group has no parameters")
    if len({id(p) for p in parameters}) != len(parameters):
        raise ValueError("a parameter is in two clip groups")
    if not known.issuperset(id(p) for p in parameters):
        raise ValueError("a clip group has a parameter that the attached module does not train")
    for group in groups:
        if not (math.isfinite(group.clip) and group.clip > 0 and 0 < group.share <= 1):
            raise ValueError(f"clip group {group.name}: clip or share is out of range")
    if not math.isclose(math.fsum(group.share for group in groups), 1.0, rel_tol=1e-12):
        raise ValueError("the shares of the clip groups do not add up to 1")


def _is_empty(losses: Tensor, units: Tensor | None, n_units: int | None) -> bool:
    """Check the shapes of one micro-batch; whether it has no sequence at all."""
    if losses.dim() != 1:
        raise ValueError(f"losses must be one a record, shape [n], not {list(losses.shape)}")
    if (units is None) != (n_units is None):
        raise ValueError("give units and n_units together")
    if units is not None and n_units is not None and len(losses):
        if units.dim() != 1 or len(units) < len(losses) or units.dtype != torch.int64:
            raise ValueError("units must be int64 and one a sequence")
        if int(units.min()) < 0 or int(units.max()) >= n_units:
            raise ValueError("units must be in range(n_units)")
    return not len(losses)


def _require_finite(tensors: Sequence[Tensor], what: str) -> None:
    """Check that no number is NaN or infinite.

    Raises
    ------
    SelfCheckFailed
        Saying what is not finite.
    """
    if not bool(torch.isfinite(torch.cat([tensor.flatten() for tensor in tensors])).all()):
        raise SelfCheckFailed(f"{what} is not finite")
