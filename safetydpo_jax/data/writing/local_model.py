"""A chat model of transformers, in PyTorch, where no server is to be had."""

import asyncio
from typing import Any

from safetydpo_jax.data.writing.answers import UnusableAnswerError
from safetydpo_jax.data.writing.endpoint import Used
from safetydpo_jax.data.writing.packages import needed
from safetydpo_jax.errors import UserError, first_line

MAX_TOKENS = 4096  # of an answer


class LocalModel:
    """Answers one question after the other; a server answers many at once, and so faster.

    Args:
      path: folder or hub id of a model with a chat template, in safetensors.

    Attributes:
      used: the sum of what answers took.

    Raises:
      UserError: PyTorch is not installed, or it is no such model.
    """

    def __init__(self, path: str):
        torch, transformers = needed("torch", "torch"), needed("transformers")
        self.used = Used()
        self._torch = torch
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", use_safetensors=True
            )
        except Exception as error:  # as many kinds as there are ways to be no such model
            reason = first_line(error)
            raise UserError(
                f"{path} cannot be read as a language model of transformers ({reason}): give the "
                "folder or hub id of one in safetensors, or the address of an endpoint"
            ) from error
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{path} has no chat template: give a model that was taught to follow instructions"
            )
        self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._one = asyncio.Lock()

    async def ask(self, question: str, *, seed: int, temperature: float) -> str:
        """The answer.

        Raises:
          UnusableAnswerError: it is empty.
        """
        async with self._one:
            return await asyncio.to_thread(self._answer, question, seed, temperature)

    def _answer(self, question: str, seed: int, temperature: float) -> str:
        messages = [{"role": "user", "content": question}]
        inputs = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        length = inputs["input_ids"].shape[1]
        limit = getattr(self._model.config, "max_position_embeddings", None) or length + MAX_TOKENS
        if limit <= length:
            raise UnusableAnswerError("question of more tokens than the model takes", again=False)
        how = {"do_sample": True, "temperature": temperature}
        if not temperature:
            how = {"do_sample": False}
        self._torch.manual_seed(seed)
        with self._torch.inference_mode():
            output = self._model.generate(
                **inputs, max_new_tokens=min(MAX_TOKENS, limit - length), **how
            )
        answer = self._tokenizer.decode(output[0, length:], skip_special_tokens=True)
        self.used.prompt_tokens += length
        self.used.answer_tokens += output.shape[1] - length
        if not answer.strip():
            raise UnusableAnswerError("refused, or an empty answer")
        self.used.answers += 1
        return answer

    async def close(self) -> None:
        """Gives its memory back: the model that draws comes next."""
        del self._model
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()
