"""What a site refuses in secure aggregation, each with a code of its own."""

from __future__ import annotations

from silotune.errors import PrivacyError


class SecureAggregationError(PrivacyError):
    """A step of secure aggregation can't be taken."""

    code = "ST-420"
    title = "Secure aggregation can't go on"
    cause = "A message of the protocol is not what an honest coordinator or site would send."
    advice = "Nothing was revealed. If it happens again, ask the coordinator's operator why."


class SignerUnknown(SecureAggregationError):
    """A message is not signed by the site it names, or that site is not enrolled."""

    code = "ST-421"
    title = "A cohort member is not who it claims to be"
    cause = (
        "A key or a survivor list is not signed by the identity that this site was enrolled with."
    )
    advice = "The coordinator may have invented a member. Compare the roster's fingerprints."


class KeyReused(SecureAggregationError):
    """A round's key was seen before."""

    code = "ST-422"
    title = "A round's key was used before"
    cause = "Two members have one key, or a member has a key of the round before."
    advice = "Fresh keys are made for every round: restart the site that is named."


class CohortTooSmall(SecureAggregationError):
    """Fewer members than the site allows."""

    code = "ST-423"
    title = "The cohort is too small to hide in"
    cause = "The round has fewer sites than this site's own minimum, or more than the plan allows."
    advice = "Wait until more sites are there, or have the site's owner lower the minimum."


class RoundUsed(SecureAggregationError):
    """A second request for something that is done once a round."""

    code = "ST-424"
    title = "This was done once in this round, and is not done again"
    cause = (
        "A site masks one update and opens one survivor set a round; a second would give it away."
    )
    advice = "The round is lost, which costs no more than its noise. Go on with the next round."


class SurvivorsInvalid(SecureAggregationError):
    """The survivor set can't be one of this round."""

    code = "ST-425"
    title = "The survivors are not a part of the cohort"
    cause = "A survivor is not in the cohort, is listed twice, or this site itself is missing."
    advice = "Nothing was revealed. Ask the coordinator's operator why it asks this."


class MessageMalformed(SecureAggregationError):
    """Wrong lengths, wrong types."""

    code = "ST-426"
    title = "A message of secure aggregation is malformed"
    cause = "A key, share, list or vector has another length or form than the protocol lays down."
    advice = "Check that all sites and the coordinator run the same version."


class TranscriptMismatch(SecureAggregationError):
    """The others saw another plan, run, round, cohort or survivor set."""

    code = "ST-427"
    title = "The sites did not see the same round"
    cause = (
        "Signatures or sealed shares belong to another plan, run, round, cohort or survivor set."
    )
    advice = "The coordinator may have told different sites different things. Stop, and ask."


class TooFewSurvivors(SecureAggregationError):
    """Below the threshold."""

    code = "ST-428"
    title = "Too few sites survived the round"
    cause = "Fewer sites sent a masked update than the threshold, so nothing may be opened."
    advice = "The round is void; the next one starts with the sites that are there."


class ShareInvalid(SecureAggregationError):
    """A secret that was put together is not the one that was shared."""

    code = "ST-429"
    title = "A site's shares do not fit together"
    cause = "Some site sent wrong shares, so that a mask can't be removed."
    advice = "The round is void. If it happens again, find the site by leaving sites out."


class CostsUnknown(PrivacyError):
    """The process that computes what events cost gave no answer."""

    code = "ST-433"
    title = "What the releases cost could not be computed"
    cause = "The short-lived process that computes it was ended, or had no memory left."
    advice = "Nothing was charged. It is started again with the next question; look at free memory."
