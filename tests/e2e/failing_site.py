"""The real daemon of a site, which drops out where it is told to.

Arguments: a JSON list of ``[round, phase, how]``, and the words of `silotune site start`. ``how`` is
"refuses", an answer that is an error, or "dies", SIGKILL on the message's arrival. A site that is gone
from a phase is gone for the rest of that round; one that died is back when somebody starts it again,
without that fault.
"""

import json
import os
import signal
import sys

from silotune.client.daemon.__main__ import main
from silotune.client.daemon.runner import Runner
from silotune.protocol.envelope import address_of, refusal, seal, seal_id
from tests.simulation.plain_rounds import PHASES

FAULTS = {(number, PHASES.index(phase)): how for number, phase, how in json.loads(sys.argv[1])}
honest = Runner.answer


def answer(self, message):
    address = address_of(message.content)
    phase = address.kind.removeprefix("train.")
    if phase in PHASES:
        for earlier in range(PHASES.index(phase) + 1):
            how = FAULTS.get((address.round, earlier))
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "refuses":
                reply = address.reply(to=seal_id(message.content))
                key = self._enrolment.keys.signing
                return seal(refusal("ST-604"), address=reply, key=key), "ST-604"
    return honest(self, message)


Runner.answer = answer
given = dict(zip(sys.argv[4::2], sys.argv[5::2], strict=True))  # what the command becomes is itself
sys.exit(main([given["--config"], "text", given["--log-level"], "30"]))
