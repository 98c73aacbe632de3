"""The error taxonomy: every failure a user can meet has a stable code, a cause and a remedy.

A family groups the codes of one part of the product and owns one exit code of the command line. The
page ``docs/errors.md`` is generated from these classes, so a class is the only place to edit.

Here are those of plans, models, data, events, exports and releases; other rooms have an ``errors.py`` of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar


class SilotuneError(Exception):
    """Root of every error that silotune raises on purpose.

    Parameters
    ----------
    detail : str
        What happened here, in one sentence. It must never quote a record.
    remedy : str, optional
        A remedy more precise than the one of the class.
    """

    code: ClassVar[str] = "ST-000"
    title: ClassVar[str] = "Something went wrong"
    cause: ClassVar[str] = "silotune met a condition it has no better name for."
    advice: ClassVar[str] = "Run the command again with --debug and report what it prints."
    exit_code: ClassVar[int] = 1

    def __init__(self, detail: str = "", *, remedy: str | None = None) -> None:
        self.detail = detail or self.title
        self.remedy = remedy or self.advice
        super().__init__(self.detail)

    def __str__(self) -> str:
        return f"{self.code} {self.detail}"


# --- plan: exit code 10 -------------------------------------------------------------------------


class PlanError(SilotuneError):
    """The plan can't be used as it is."""

    code, exit_code = "ST-100", 10
    title = "The plan is not usable"
    cause = "The plan file could not be read as a plan."
    advice = "Compare it with `silotune plan schema` and the commented example in examples/."


class PlanUnreadable(PlanError):
    """The file is missing or isn't TOML."""

    code = "ST-101"
    title = "The plan file can't be read"
    cause = "The file does not exist, is not readable, or is not valid TOML."
    advice = "Check the path, and the line and column that the message names."


class PlanInvalid(PlanError):
    """A key is unknown, has the wrong type, or contradicts another."""

    code = "ST-102"
    title = "The plan has invalid settings"
    cause = "A key is unknown, a value has the wrong type or range, or two settings contradict."
    advice = "Correct the keys that the message lists; each line says what was expected."


class PlanSignatureInvalid(PlanError):
    """The signature doesn't fit the plan."""

    code = "ST-103"
    title = "The plan's signature is not valid"
    cause = "The plan was changed after it was signed, or signed with another key."
    advice = "Ask the coordinator's operator for the signed plan; never run an unsigned one."


# --- data: exit code 20 -------------------------------------------------------------------------


class PlanInTheWay(PlanError):
    """A plan would be written over a file."""

    code = "ST-104"
    title = "There is a file in the plan's place already"
    cause = "A new plan is written only where no file is, so that nobody's work is lost."
    advice = "Give another name, or --force to replace the file."


class DataError(SilotuneError):
    """A site's records can't be used."""

    code, exit_code = "ST-200", 20
    title = "The dataset is not usable"
    cause = "The site's dataset does not fit what the plan asks for."
    advice = "Check the dataset's entry in site.toml and the file it names."


class DatasetUnknown(DataError):
    """The plan names a dataset that the site doesn't offer."""

    code = "ST-202"
    title = "The site does not offer this dataset"
    cause = "The plan asks for a dataset by a name that site.toml does not have."
    advice = "Add a [datasets.NAME] table to site.toml, or correct data.dataset in the plan."


class DatasetUnreadable(DataError):
    """The file or query can't be read."""

    code = "ST-203"
    title = "The dataset can't be read"
    cause = "The file is missing, not readable, or not of the format that its entry says."
    advice = "Check the path, the permissions and the format in site.toml."


class ColumnMissing(DataError):
    """A column that a role needs is not there."""

    code = "ST-204"
    title = "A column is missing"
    cause = "The plan's task needs a column that the dataset does not have under that name."
    advice = "Map the role to the right column under [datasets.NAME.columns] in site.toml."


class RecordInvalid(DataError):
    """A record breaks the schema; the message has file, row and column, never the record."""

    code = "ST-205"
    title = "A record is not usable"
    cause = "A text is empty or a label is not one of the plan's labels."
    advice = "Correct or remove the rows that the message counts."


class TooFewRecords(DataError):
    """Not enough units to train on."""

    code = "ST-207"
    title = "The dataset is too small"
    cause = "A split has no records, or the expected batch is larger than the declared units."
    advice = "Lower the plan's batch or rate, or offer more records."


class FolderOccupied(DataError):
    """A folder to be filled with sites already holds other sites."""

    code = "ST-209"
    title = "The folder already holds other sites"
    cause = "Its subfolders have site.toml files of sites that are not among those to be written."
    advice = "Give a new folder, or remove the old sites first."


# --- model: exit code 30 ------------------------------------------------------------------------


class ModelError(SilotuneError):
    """The base model or an adapter can't be used."""

    code, exit_code = "ST-300", 30
    title = "The model is not usable"
    cause = "The base model does not fit the plan."
    advice = "Check model.base and model.task in the plan."


class ModelNotFound(ModelError):
    """The base model isn't on this machine."""

    code = "ST-301"
    title = "The base model is not on this machine"
    cause = "model.base is neither a folder here nor a model in the local Hugging Face cache."
    advice = "Download the model to a folder first and put its path into the plan or site.toml."


class ModelHashMismatch(ModelError):
    """The weights aren't those of the plan."""

    code = "ST-302"
    title = "The base model's weights are not the ones of the plan"
    cause = "The SHA-256 of the weight files differs from model.sha256."
    advice = "Get the same revision of the model as the plan's author, or correct the hash."


class LayerUnsupported(ModelError):
    """A trainable layer has no exact per-unit gradient."""

    code = "ST-303"
    title = "A layer can't be trained under differential privacy"
    cause = "Exact per-unit gradients do not exist in silotune for this kind of layer."
    advice = "Leave it out of lora.target_modules, or train without privacy."


class TargetModulesUnknown(ModelError):
    """No module has the names of lora.target_modules."""

    code = "ST-304"
    title = "The plan's target modules are not in the model"
    cause = "lora.target_modules names modules that the base model does not have."
    advice = "Use one of the names that the message lists, or 'auto'."


class AdapterMismatch(ModelError):
    """An adapter has other arrays than the plan's model."""

    code = "ST-305"
    title = "The adapter does not fit the model"
    cause = "Names, shapes or sizes of the adapter's arrays differ from the plan's layout."
    advice = "Use the adapter with the plan (and base model) that it was made with."


# --- privacy: exit code 40 ----------------------------------------------------------------------


class PrivacyError(SilotuneError):
    """A guarantee can't be given."""

    code, exit_code = "ST-400", 40
    title = "The privacy guarantee can't be given"
    cause = "A condition that the guarantee rests on does not hold."
    advice = "Nothing was released. Read the detail, correct it, start again."


class BudgetExceeded(PrivacyError):
    """The ledger may not reach what was asked."""

    code = "ST-401"
    title = "The privacy budget does not allow this"
    cause = "What was asked, added to what is spent and reserved, exceeds the dataset's budget."
    advice = "Lower privacy.epsilon or the rounds in the plan, or have the budget raised."


class LedgerDamaged(PrivacyError):
    """The ledger was truncated, edited or rolled back."""

    code = "ST-402"
    title = "The privacy ledger is damaged"
    cause = "The hash chain is broken, or the ledger is older than its head file says."
    advice = "Restore the newest ledger and head from backup; do not train until it verifies."


class ValueUnaccounted(PrivacyError):
    """A value would leave that is neither public nor a charged release."""

    code = "ST-403"
    title = "A value without an account was stopped at the gate"
    cause = "The site's code tried to send a value that is neither declared public nor charged."
    advice = "This is a defect: report it. Nothing was sent."


class SelfCheckFailed(PrivacyError):
    """A run-time check of the training step failed."""

    code = "ST-404"
    title = "A self-check of the private step failed"
    cause = "A tensor did not move, gradients went past their rule, noise was off, or NaN appeared."
    advice = "Nothing was released. Report the detail with your library versions."


class CalibrationImpossible(PrivacyError):
    """No noise level gives the asked epsilon."""

    code = "ST-405"
    title = "No noise level reaches this epsilon"
    cause = "The asked epsilon is too small for the rate and the number of steps."
    advice = "Raise epsilon, lower the rate, or take fewer rounds."


class CertificateInvalid(PrivacyError):
    """A privacy certificate doesn't verify."""

    code = "ST-406"
    title = "The certificate does not verify"
    cause = "Its signature, its events or its epsilon do not agree with each other."
    advice = "Ask the site for the original file; do not rely on this one."


class ReleaseConflict(PrivacyError):
    """A release id was used before for something else."""

    code = "ST-407"
    title = "A release was already charged with other content"
    cause = "The same run, round and release id came again, but its stored reply is gone."
    advice = "Start a new run; the old release can't be repeated without a second charge."


class ReservationInvalid(PrivacyError):
    """A run charges what it never reserved, or reserves again as something else."""

    code = "ST-408"
    title = "The run has no fitting reservation in the ledger"
    cause = "A run reserves its whole cost once, under one plan, before its first release."
    advice = "Start a new run; a run can't change its plan or its noise half way."


class FileExposed(PrivacyError):
    """A private file can be read by other accounts of this machine."""

    code = "ST-409"
    title = "A private file is open to other accounts"
    cause = "A ledger, key or stored reply has group or world permissions."
    advice = "Find out who could read it, then `chmod 600` the file that the message names."


class EventInvalid(PrivacyError):
    """A privacy event is of an unknown kind or has impossible numbers."""

    code = "ST-410"
    title = "A privacy event can't be accounted for"
    cause = "The event is of a kind, or has a rate, noise or count, that the accountant refuses."
    advice = "It was written by another version or edited: restore the original file."


# --- policy: exit code 50 -----------------------------------------------------------------------


class PolicyError(SilotuneError):
    """The site's policy refuses."""

    code, exit_code = "ST-500", 50
    title = "The site's policy refuses this"
    cause = "A clause of the site's own configuration outranks the plan."
    advice = "Change the plan, or have the site's owner change the clause that is named."


# --- run: exit code 60 --------------------------------------------------------------------------


class RunError(SilotuneError):
    """A run can't start or go on."""

    code, exit_code = "ST-600", 60
    title = "The run can't go on"
    cause = "The coordinator can't continue this run."
    advice = "Read the detail; after correcting it, resume the run."


class QuorumLost(RunError):
    """Fewer sites answered than the plan asks for."""

    code = "ST-601"
    title = "Too few sites answered"
    cause = "Fewer sites than rounds.min_sites answered before the deadline."
    advice = "Look at the per-site reasons in the run's events, then resume the run."


class RunDirectoryInvalid(RunError):
    """A run directory is missing or incomplete."""

    code = "ST-602"
    title = "This is not a usable run directory"
    cause = "The folder does not exist or lacks files that every run writes."
    advice = "Give the path that `silotune simulate` printed."


class UpdateRejected(RunError):
    """A site's update has the wrong shape or isn't finite."""

    code = "ST-603"
    title = "A site's update was rejected"
    cause = "The update has a wrong length or type, or contains NaN or infinity."
    advice = "Check the named site's version and logs; its update was left out."


class WorkerDied(RunError):
    """A simulation worker ended unexpectedly."""

    code = "ST-604"
    title = "A simulation worker died"
    cause = "A worker process ended, most often for lack of memory."
    advice = "Use fewer --workers or a smaller privacy.max_physical_batch, then resume."


class SiteReportedError(RunError):
    """A site answered with an error; only its code crossed the wire."""

    code = "ST-605"
    title = "A site reported an error"
    cause = "The site's own code stopped; its log has the details, which never leave the site."
    advice = "Ask the site's team to look the code up in docs/errors.md."


class AttackRefused(RunError):
    """A site does not let its own run be attacked."""

    code = "ST-606"
    title = "A site does not allow attacks on its runs"
    cause = "Its site.toml has `allow_attacks = false`; an attack trains on its records again."
    advice = "Ask the site's team, or simulate without that site."


# --- environment: exit code 70 ------------------------------------------------------------------


class EnvironmentFault(SilotuneError):
    """Something outside silotune is missing."""

    code, exit_code = "ST-700", 70
    title = "Something silotune needs is missing here"
    cause = "An optional package, a device or a file is not there."
    advice = "Install what the message names."


def catalogue() -> list[type[SilotuneError]]:
    """Every error with a code of its own, ordered by code, those of the packages included."""
    for found in sorted(Path(__file__).parent.glob("*/errors.py")):
        # Found as files: to ask `find_spec` would import every package, and PyTorch with them.
        import_module(f"silotune.{found.parent.name}.errors")

    def below(cls: type[SilotuneError]) -> list[type[SilotuneError]]:
        return [cls, *(leaf for sub in cls.__subclasses__() for leaf in below(sub))]

    named = [cls for cls in below(SilotuneError) if "code" in cls.__dict__]
    return sorted(named, key=lambda cls: cls.code)


def told_again(said: Mapping[str, Any]) -> SilotuneError:
    """An error as another process told it: its ``code``, ``detail`` and ``remedy``."""
    known = {error.code: error for error in catalogue()}
    kind = known.get(str(said.get("code")), SilotuneError)
    return kind(str(said.get("detail") or ""), remedy=said.get("remedy"))


class LengthRefused(ModelError):
    """data.max_length is more than the model takes."""

    code = "ST-306"
    title = "The plan's texts are longer than the model takes"
    cause = "data.max_length is above the number of tokens that the base model has positions for."
    advice = "Lower data.max_length in the plan to the number that the message gives."


class TextRefused(ModelError):
    """The model fails on texts."""

    code = "ST-307"
    title = "The model fails on public texts or images"
    cause = "It takes something else, its tokenizer is another model's, or a layer of it failed."
    advice = "Use a model for the task, with its own tokenizer; the message names what failed."


class RecordsMixed(ModelError):
    """What the model makes of a record depends on other records."""

    code = "ST-308"
    title = "The model mixes the records of a batch"
    cause = "A public text's loss or gradient changed with the texts beside it or with its padding."
    advice = "Use another base model: clipping can't bound what one record does to the others."


class TokensSeenEarly(ModelError):
    """A model that sees the answer can't be taught to give it."""

    code = "ST-309"
    title = "The model sees the tokens that it is to predict"
    cause = "Another last token changed what the model predicts at earlier ones: it is an encoder."
    advice = "Use a decoder for causal_lm, or this model for text_classification."


class ChatRefused(ModelError):
    """A chat and the template that should show it don't fit."""

    code = "ST-310"
    title = "The chat template can't be used"
    cause = "There is none, it does not show turns as they are, or it takes no such order of roles."
    advice = "Say in [model.chat.template] of the plan what stands around the turns."


class SiteConfigInvalid(DataError):
    """site.toml is wrong."""

    code = "ST-201"
    title = "The site configuration is not valid"
    cause = "site.toml is missing, is not TOML, or has an unknown or wrong setting."
    advice = "Correct the keys that the message lists; examples/site.toml explains each."


class UnitMismatch(DataError):
    """The plan protects another unit than the one the site offers its dataset under."""

    code = "ST-208"
    title = "The plan's privacy unit is not the site's"
    cause = "privacy.unit of the plan differs from the unit of the dataset in site.toml."
    advice = "Set privacy.unit to the site's unit; its budget and declared_units count that one."


class LabelsUnfit(DataError):
    """The site declares a label that the plan lacks."""

    code = "ST-210"
    title = "The plan lacks a label that the site declares"
    cause = "A label in labels of the dataset in site.toml is not one of model.labels of the plan."
    advice = "Add the label to model.labels, spelled as in site.toml, or take it out of site.toml."


class HeldOutTooMuch(DataError):
    """The plan holds out more than the site lends for it."""

    code = "ST-211"
    title = "The plan holds out too large a share"
    cause = "test_share and validation_share together are above max_held_out of the dataset."
    advice = "Lower the shares in the plan, or raise max_held_out in site.toml."


class RecordsChanged(DataError):
    """A run can't go on with other records than it began with."""

    code = "ST-212"
    title = "The records changed since the run began"
    cause = "A site's records are not those that the first rounds of this run were trained on."
    advice = "Put the old records back, or start a new run."


class EventMalformed(RunError):
    """An event lacks a field of its kind or has one of another type."""

    code = "ST-630"
    title = "An event is not of its schema"
    cause = (
        "A field is missing or of another type; the file was edited, or the writer has a defect."
    )
    advice = "Compare the fields named with docs/events.md; restore the file if it was edited."


class RunNotFound(RunError):
    """There is no run of that name where one was looked for."""

    code = "ST-631"
    title = "There is no such run here"
    cause = "The name is wrong, or the run is in another folder or federation."
    advice = "Choose one from the list of runs."


class FileNotOffered(RunError):
    """The run has no such file to download."""

    code = "ST-632"
    title = "The run does not offer this file"
    cause = "The file is not there yet, or is not one that may be downloaded."
    advice = "Choose one from the run's page; adapters come with the first finished round."


class ExtraMissing(EnvironmentFault):
    """An optional package that the user asked for is not installed."""

    code = "ST-701"
    title = "An optional part of silotune is not installed"
    cause = (
        "Some connections to other tools need packages that silotune does not install by itself."
    )
    advice = "Install the extra that the message names into the environment that silotune runs in."


class ExportInTheWay(EnvironmentFault):
    """The place to write to holds this very run already."""

    code = "ST-760"
    title = "This run was exported there before"
    cause = "A second copy of the same curves would be drawn on top of the first."
    advice = "Give another folder with --out, or remove the earlier export."


class ReleaseRefused(PrivacyError):
    """A control that an adapter has to pass before it leaves was not passed."""

    code = "ST-415"
    title = "The adapter does not pass the gate"
    cause = (
        "A certificate, an attack or a bound says that it should not leave the consortium as it is."
    )
    advice = "Read the control that the message names; `silotune release RUN` lists all of them."


class ReleaseInvalid(PrivacyError):
    """A signed release doesn't fit the adapter beside it."""

    code = "ST-416"
    title = "The signed release does not verify"
    cause = "Its signature does not fit, or the adapter or a certificate was changed after signing."
    advice = "Use the adapter that was signed, or have this one pass the gate again."


class ExportRefused(EnvironmentFault):
    """A form that can't hold the model, or answers otherwise."""

    code = "ST-762"
    title = "The adapter can't be exported like this"
    cause = (
        "The form can't hold the model, or its answers about public texts were not the adapter's."
    )
    advice = "Choose another --format; `peft` holds every adapter."
