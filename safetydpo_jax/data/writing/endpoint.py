"""An endpoint that speaks OpenAI's chat protocol: vLLM, llama.cpp, JetStream, or a service."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from safetydpo_jax.data.writing.answers import UnusableAnswerError
from safetydpo_jax.data.writing.packages import needed
from safetydpo_jax.errors import UserError

RETRIES = 6  # of the client's own, after 0.5 to 8 s, or after what the server asks for
KEY = "OPENAI_API_KEY"
_REFUSED = (400, 402, 422)  # as any other question will be, if so many are before an answer
_REFUSALS = 5
_PAY = 402  # as any other question will be, whatever was answered before
_QUOTA = "insufficient_quota"  # OpenAI's code for the same, with 429
_FAILURES = 10  # questions in a row, each asked RETRIES + 1 times, to which it is busy or broken


@dataclass
class Used:
    """What the answers have cost so far, as the endpoint counts it."""

    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Endpoint:
    """Asks one question after the other, waiting where it is asked too often.

    Args:
      url: up to and with /v1.
      model: its name there.
      requests_per_minute: at most, the client's retries not counted; 0 for no limit.
      timeout: seconds until an answer is given up and asked for again.
      answered: whether it has answered such questions before: then it is a single one's own fault
        that it is refused, as by a filter of contents.

    Attributes:
      used: the sum of what the endpoint says that answers took.

    Raises:
      UserError: its client is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        requests_per_minute: float,
        timeout: float,
        answered: bool = False,
    ):
        aiolimiter, openai = needed("aiolimiter"), needed("openai")
        logging.getLogger("openai").setLevel(logging.WARNING)  # below, it may show the questions
        self._openai, self._url, self._model = openai, url, model
        self.used = Used()
        self._answered_before, self._refusals, self._failures = answered, 0, 0
        # Servers of one's own take any key, but the client insists on one.
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get(KEY) or "none",
            max_retries=RETRIES,
            timeout=timeout,
        )
        # One in its share of a minute, so that a minute's do not come all at once.
        self._limiter = (
            aiolimiter.AsyncLimiter(1, 60 / requests_per_minute) if requests_per_minute else None
        )

    async def ask(self, question: str, *, seed: int, temperature: float) -> str:
        """The answer.

        Raises:
          UnusableAnswerError: none, after the client's retries.
          UserError: the endpoint is not there, or does not take the key or the model. What it says
            is not shown, as it may quote the question.
        """
        openai = self._openai
        if self._limiter:
            await self._limiter.acquire()
        try:
            answer: Any = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": question}],
                seed=seed,
                temperature=temperature,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{self._url} does not take the key ({error.status_code}): set {KEY}"
            ) from None
        except openai.NotFoundError:
            raise UserError(
                f"{self._url} has no model {self._model!r} or no chat (404): see {self._url}/models"
            ) from None
        except openai.APITimeoutError:
            raise UnusableAnswerError("no answer in time", again=False) from None
        except openai.APIConnectionError:
            raise UserError(
                f"{self._url} cannot be reached, after {RETRIES + 1} tries: what was written so "
                "far is kept, and the same command goes on"
            ) from None
        except openai.APIStatusError as error:
            failed = error.status_code == 429 or error.status_code >= 500
            self._failures = self._failures + 1 if failed else 0
            if self._failures >= _FAILURES:
                raise UserError(
                    f"{self._url} has answered none of the last {_FAILURES} requests "
                    f"({error.status_code}): what was written so far is kept, and the same command "
                    "goes on once it is well, or with a lower --concurrency"
                ) from None
            self._refusals += error.status_code in _REFUSED
            spent = error.status_code == _PAY or error.code == _QUOTA
            answered = self._answered_before or self.used.answers > 0
            if spent or (self._refusals >= _REFUSALS and not answered):
                raise UserError(
                    f"{self._url} refuses the requests ({error.status_code}): see what it wants of "
                    "--model and --temperature, or whether its quota is used up"
                ) from None
            raise UnusableAnswerError(f"status {error.status_code}", again=False) from None
        except (openai.OpenAIError, ValueError) as error:
            raise UnusableAnswerError(f"{type(error).__name__}") from None
        try:
            content = answer.choices[0].message.content
            if answer.usage:
                self.used.prompt_tokens += int(answer.usage.prompt_tokens or 0)
                self.used.answer_tokens += int(answer.usage.completion_tokens or 0)
        except (AttributeError, TypeError, ValueError, LookupError):
            raise UnusableAnswerError("malformed answer") from None  # the client checks nothing
        if not isinstance(content, str) or not content:
            raise UnusableAnswerError("refused, or an empty answer")
        self.used.answers += 1
        self._failures = 0
        return content

    async def close(self) -> None:
        """Ends its connections."""
        await self._client.close()
