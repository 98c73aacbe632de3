"""Errors of a site: its policy's refusals, its daemon's troubles, and what its doctor finds."""

from __future__ import annotations

from silotune.errors import EnvironmentFault, PolicyError, PrivacyError, RunError

# --- policy: one code a clause ------------------------------------------------------------------


class PolicyMissing(PolicyError):
    """site.toml has no policy."""

    code = "ST-501"
    title = "The site has no policy"
    cause = "site.toml has no [policy] table, and without one a site allows nothing."
    advice = "Write [policy] into site.toml; examples/site.toml explains each clause."


class EpsilonOfRunRefused(PolicyError):
    """The plan's epsilon is over the policy's."""

    code = "ST-502"
    title = "The plan asks for too much epsilon"
    cause = "privacy.epsilon of the plan is more than policy.max_epsilon allows for one run."
    advice = "Lower privacy.epsilon in the plan, or have the site's owner raise the clause."


class EpsilonInTotalRefused(PolicyError):
    """With this run, the dataset would pass the total of the policy."""

    code = "ST-503"
    title = "The runs together would pass the site's epsilon"
    cause = "Spent, reserved and asked epsilon together are over policy.max_total_epsilon."
    advice = "Lower privacy.epsilon in the plan; what is spent never comes back."


class DeltaRefused(PolicyError):
    """The plan's delta is over the policy's."""

    code = "ST-504"
    title = "The plan's delta is too large"
    cause = "privacy.delta of the plan is more than policy.max_delta."
    advice = "Lower privacy.delta in the plan; it should be well below one over the units."


class PrivacyRequired(PolicyError):
    """The plan has no differential privacy, and the policy wants it."""

    code = "ST-505"
    title = "The site trains under differential privacy only"
    cause = "privacy.mode of the plan is 'none', and policy.require_privacy is true."
    advice = "Set privacy.mode, epsilon, delta and clip in the plan."


class SeededNoiseRefused(PolicyError):
    """The plan's noise can be repeated."""

    code = "ST-506"
    title = "The plan's noise could be repeated by others"
    cause = "The plan has a seed, which makes noise guessable; policy.allow_seeded_noise is false."
    advice = "Remove plan.seed; a seed is for simulations and tests."


class SecureAggregationRequired(PolicyError):
    """The coordinator would see this site's update alone."""

    code = "ST-507"
    title = "The site takes part under secure aggregation only"
    cause = "The plan has no secure aggregation; policy.require_secure_aggregation is true."
    advice = "Set aggregation.secure in the plan, or have the site's owner change the clause."


class CohortBelowPolicy(PolicyError):
    """Too few sites would take part."""

    code = "ST-508"
    title = "Too few sites would take part"
    cause = "rounds.min_sites of the plan, or the cohort of a round, is below policy.min_cohort."
    advice = "Raise rounds.min_sites, or wait until more sites have joined."


class BaseModelRefused(PolicyError):
    """The base model isn't among the allowed ones."""

    code = "ST-509"
    title = "The base model is not allowed here"
    cause = "model.sha256 of the plan is missing or is not a key of policy.base_models."
    advice = "Pin model.sha256 in the plan, and have the site's owner look at the model and add it."


class TaskRefused(PolicyError):
    """The task isn't among the allowed ones."""

    code = "ST-510"
    title = "The task is not allowed here"
    cause = "model.task of the plan is not listed in policy.tasks."
    advice = "Have the site's owner add the task, or leave the site out."


class TargetModulesRefused(PolicyError):
    """The adapter would be put where the policy doesn't want it."""

    code = "ST-511"
    title = "The adapter's place is not allowed here"
    cause = "lora.target_modules of the plan has a name that policy.target_modules lacks."
    advice = "Use allowed modules in the plan, or have the site's owner add the name."


class StrategyRefused(PolicyError):
    """The strategy isn't among the allowed ones."""

    code = "ST-512"
    title = "The strategy is not allowed here"
    cause = "aggregation.strategy of the plan is not listed in policy.strategies."
    advice = "Use an allowed strategy, or have the site's owner add it."


class TooManyRounds(PolicyError):
    """The run is too long."""

    code = "ST-513"
    title = "The plan has too many rounds"
    cause = "rounds.number of the plan is more than policy.max_rounds."
    advice = "Lower rounds.number, or have the site's owner raise the clause."


class UploadTooLarge(PolicyError):
    """A round would send too many bytes."""

    code = "ST-514"
    title = "A round would send too much"
    cause = "What the plan sends in a round is more than policy.max_upload_mb, or can't be told."
    advice = "Lower lora.r, adapt fewer layers, or have the site's owner raise the clause."


class OutsideHours(PolicyError):
    """It's not the time for training."""

    code = "ST-515"
    title = "Training is not allowed at this hour"
    cause = "The site's local time is outside of policy.hours."
    advice = "Go on within the site's hours; a run waits for its sites and can be resumed."


class ApprovalMissing(PolicyError):
    """Nobody at the site has approved exactly this plan."""

    code = "ST-516"
    title = "The site has not approved this plan"
    cause = "No approval is stored for this plan's hash; a changed plan is another plan."
    advice = "At the site: `silotune site plans`, then `silotune site approve HASH`."


class PlanRejectedHere(PolicyError):
    """Somebody at the site has rejected this plan."""

    code = "ST-517"
    title = "The site has rejected this plan"
    cause = "A person at the site said no to this plan's hash."
    advice = "Talk to the site; it can still approve the plan with `silotune site approve HASH`."


# --- run ----------------------------------------------------------------------------------------


class SitePaused(RunError):
    """The site's own people have paused it."""

    code = "ST-640"
    title = "The site is paused"
    cause = "Somebody at the site ran `silotune site pause`."
    advice = "It answers again after `silotune site resume`; then resume the run."


class RoundUnanswered(PrivacyError):
    """All that leaves of what goes wrong with records at hand."""

    code = "ST-411"
    title = "The site does not answer"
    cause = (
        "Something failed at the site, which tells nobody else what: that may depend on records."
    )
    advice = "The site's own log and `troubles.jsonl` in its state folder say what happened."


class BroadcastRefused(RunError):
    """What the coordinator sent can't be trained from."""

    code = "ST-651"
    title = "The adapter that was sent is not usable"
    cause = (
        "It has another size than the plan's, or numbers that are not finite or beyond a million."
    )
    advice = "The run has diverged, or the coordinator is at fault. No record was touched."


class RankRefused(PolicyError):
    """The adapter's rank is more than this machine trains."""

    code = "ST-518"
    title = "The plan's rank is larger than the site's resources allow"
    cause = "resources.max_rank of site.toml is below lora.r, and the strategy needs one rank."
    advice = "Lower lora.r, use strategy 'flexlora', or have max_rank raised."


class DeltaTooLarge(PolicyError):
    """The plan's delta promises next to nothing for so many units."""

    code = "ST-519"
    title = "The plan's delta is at or above 1/declared_units"
    cause = "With such a delta a mechanism may hand out a whole record and still keep its promise."
    advice = (
        "Lower privacy.delta well below 1/declared_units, or say policy.allow_large_delta = true."
    )


class RunNotProposed(RunError):
    """A message names a run that was never proposed to this site."""

    code = "ST-642"
    title = "The run is not known here"
    cause = "The coordinator never proposed this run to the site, or the plan differs from it."
    advice = "Start the run with `silotune coordinator run`, which proposes it first."


class DaemonAbsent(RunError):
    """No daemon answers at the socket."""

    code = "ST-643"
    title = "The site's daemon is not running"
    cause = "Nothing answers at the daemon's socket in the state folder."
    advice = "Start it: `silotune site start`, or `systemctl start silotune-site`."


class DaemonRunning(RunError):
    """Another daemon has the state folder."""

    code = "ST-644"
    title = "The site's daemon is running already"
    cause = "Another process holds the lock of the state folder."
    advice = "Use the running one; `silotune site status` asks it."


class SiteNotEnrolled(RunError):
    """The site has not joined a federation."""

    code = "ST-645"
    title = "The site has not joined a federation"
    cause = "The state folder holds no certificate."
    advice = "Ask the coordinator's operator for a code, then `silotune site join CODE`."


class EnrolmentRefused(RunError):
    """The operator said no."""

    code = "ST-646"
    title = "The coordinator's operator refused the enrolment"
    cause = "The request was looked at and refused."
    advice = "Ask the operator for the reason and for a new code."


class SiteCommandFailed(RunError):
    """The daemon could not do what it was told."""

    code = "ST-648"
    title = "The site's daemon could not do that"
    cause = "The daemon answered the command with an error, whose code the message has."
    advice = "Read the detail; `silotune errors CODE` explains the code that it names."


# --- surroundings, as the doctor finds them ----------------------------------------------------


class NameUnresolved(EnvironmentFault):
    """DNS."""

    code = "ST-740"
    title = "The coordinator's name is not found"
    cause = "This machine's name service does not know the host of the coordinator's address."
    advice = "Check /etc/resolv.conf and the address; ask the coordinator's operator for it."


class CertificateExpired(EnvironmentFault):
    """The site's own certificate."""

    code = "ST-744"
    title = "The site's certificate is expired or not valid yet"
    cause = "Its dates do not include this moment; it is renewed only while the daemon runs."
    advice = "Check the clock; if the certificate is really old, join again with a new code."


class DiskLow(EnvironmentFault):
    """Little space left for the site's state."""

    code = "ST-746"
    title = "The disk is almost full"
    cause = "The state folder's file system has less space than a run may need."
    advice = "Free some space: without it nothing can be charged, and so nothing released."


class IsolationMissing(EnvironmentFault):
    """The kernel, or what the account may ask of it, lacks a protection that the site requires."""

    code = "ST-749"
    title = "A required protection of records is not in force"
    cause = (
        "[isolation] require of site.toml names a protection of the process that reads records, and "
        "this machine does not put it up."
    )
    advice = (
        "`silotune site doctor` says what each one needs: a newer kernel, user namespaces, a limit in "
        "site.toml. Or take the name out of [isolation] require."
    )


class DeviceMissing(EnvironmentFault):
    """No GPU."""

    code = "ST-747"
    title = "The configured device is not there"
    cause = "resources.device names a GPU that PyTorch does not see."
    advice = "Check the driver with `nvidia-smi`, or set resources.device to 'cpu'."


class RestoreNotNeeded(RunError):
    """`site restore` was called on books that are the newest."""

    code = "ST-650"
    title = "There is nothing to restore"
    cause = (
        "Ledger and audit log are those that the coordinator signed last, or it has signed none."
    )
    advice = "Start the site: `silotune site start`."


# --- the trainer, the process that reads records: exit code 70 -----------------------------------


class TrainerFault(EnvironmentFault):
    """The process that reads records failed; what it failed on stays at the site."""

    code = "ST-750"
    title = "The trainer failed"
    cause = "The process that reads the records and trains met an error that it has no name for."
    advice = "Read the daemon's log around that time; the next round begins with a fresh process."


class TrainerDied(TrainerFault):
    """It ended while something was asked of it."""

    code = "ST-751"
    title = "The trainer came to an end in the middle of its work"
    cause = (
        "It crashed, somebody ended it, or the kernel did because the machine's memory was used up."
    )
    advice = (
        "Look into the kernel's log for 'Out of memory' and into the daemon's for a crash. The next "
        "round begins with a fresh process."
    )


class TrainerStuck(TrainerFault):
    """It did not answer in time."""

    code = "ST-752"
    title = "The trainer took longer than the plan's deadline"
    cause = (
        "A round took longer than rounds.deadline of the plan, or the process hangs; it was ended."
    )
    advice = "If rounds are slow here, ask for a longer deadline, or give more threads or a device."


class TrainerOutOfMemory(TrainerFault):
    """It asked for more memory than it may have."""

    code = "ST-753"
    title = "The trainer ran out of memory"
    cause = (
        "resources.memory_mb of site.toml, the machine or the device has less than a step needs."
    )
    advice = "Raise resources.memory_mb, or ask for a smaller privacy.max_physical_batch."


class TrainerDiskFull(TrainerFault):
    """Its scratch folder has no room."""

    code = "ST-754"
    title = "The trainer's disk is full"
    cause = "The disk of the site's state folder has no room for the trainer's temporary files."
    advice = "Free space there; the next round begins with a fresh process."


class TrainerAnswerInvalid(TrainerFault):
    """It said something that it can't have to say."""

    code = "ST-755"
    title = "The trainer's answer is not of the form that was asked for"
    cause = "It is of another shape, type or size than the plan's, or is no answer to the question."
    advice = (
        "It was ended, and nothing of the answer was used. If it happens again, look at what the "
        "records contain: somebody may have taken the process over by them."
    )


class TrainerNotStarted(TrainerFault):
    """The process could not be started."""

    code = "ST-756"
    title = "The trainer could not be started"
    cause = "The machine has no process or memory left, or the installation is damaged."
    advice = "Run `silotune site doctor`, and read the daemon's log."
