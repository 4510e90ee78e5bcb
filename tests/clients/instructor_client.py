"""instructor, in its modes of tools and of schemas; without retries, so that every answer counts."""

from __future__ import annotations

import instructor
import openai
from cases import KEY, MESSAGES, MODEL, URL, Person, Scene, count

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key=KEY), mode=mode)
    for model in (Person, Scene):
        count(
            f"{mode.name}, {model.__name__}",
            lambda seed, client=client, model=model: client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                response_model=model,
                max_retries=0,
                seed=seed,
                temperature=1,
            ),
        )
