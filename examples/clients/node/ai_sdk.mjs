// Vercel's AI SDK over Responses: a picture, a form, and a tool.
// node examples/clients/node/ai_sdk.mjs IMAGE [BASE_URL]
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [path, baseURL = "http://127.0.0.1:8000"] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${baseURL}/v1`, apiKey: "none" });
const model = openai.responses("demo");

const { textStream } = streamText({
  model,
  messages: [
    {
      role: "user",
      content: [
        { type: "image", image: readFileSync(path) },
        { type: "text", text: "What is in the picture?" },
      ],
    },
  ],
});
for await (const piece of textStream) process.stdout.write(piece);
console.log();

const { object } = await generateObject({
  model,
  temperature: 0,
  prompt: "A square.",
  schema: z.object({ kind: z.string(), sides: z.number().int() }),
});
console.log("form:", object);

const { steps } = await generateText({
  model,
  temperature: 0,
  maxOutputTokens: 64,
  prompt: "What is the weather?",
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  tools: {
    weather: tool({
      description: "The weather of a place.",
      inputSchema: z.object({ place: z.string().max(20) }),
      execute: async () => "rain",
    }),
  },
});
console.log("steps:", steps.length, "called:", steps[0].toolCalls.length);
