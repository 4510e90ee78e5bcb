// OpenAI's client for JavaScript: a picture, by chat completions and by Responses.
// node examples/clients/node/openai.mjs IMAGE [BASE_URL]
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [path, baseURL = "http://127.0.0.1:8000"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: "none" });
const picture = `data:image/png;base64,${readFileSync(path).toString("base64")}`;
const text = "What is in the picture?";

const chunks = await client.chat.completions.create({
  model: "demo",
  stream: true,
  messages: [
    {
      role: "user",
      content: [
        { type: "image_url", image_url: { url: picture } },
        { type: "text", text },
      ],
    },
  ],
});
for await (const chunk of chunks) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
console.log();

const stream = client.responses.stream({
  model: "demo",
  input: [
    {
      role: "user",
      content: [
        { type: "input_image", image_url: picture, detail: "auto" },
        { type: "input_text", text },
      ],
    },
  ],
});
stream.on("response.output_text.delta", (event) => process.stdout.write(event.delta));
const response = await stream.finalResponse();
console.log();

const next = await client.responses.create({
  model: "demo",
  input: "What colour is it?",
  previous_response_id: response.id,
});
console.log(next.output_text);
