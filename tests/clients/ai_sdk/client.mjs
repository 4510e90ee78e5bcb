// Vercel's AI SDK: objects, and tools that must be called. Prints one JSON line per case.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, tool } from "ai";
import { z } from "zod";

const [url, modelName, countText] = process.argv.slice(2);
const count = Number(countText);
const prompt = "What is in the picture?";
const model = (structured) =>
  createOpenAICompatible({
    name: "sensorium",
    baseURL: url,
    apiKey: "none",
    supportsStructuredOutputs: structured,
  })(modelName);

const person = z.object({ name: z.string(), age: z.number().int().min(0).max(150) });
const scene = z.object({
  title: z.string(),
  shapes: z.array(z.object({ kind: z.enum(["circle", "square"]), size: z.number() })),
  counts: z.record(z.enum(["red", "blue"]), z.number().int()),
  notes: z.record(z.string(), z.string()),
  matrix: z.array(z.array(z.number().int())),
  id: z.string().optional(),
  when: z.iso.date(),
  mail: z.email(),
  link: z.url(),
  key: z.uuid(),
  either: z.union([z.string(), z.number(), z.null()]),
  tagged: z.discriminatedUnion("t", [
    z.object({ t: z.literal("a"), a: z.boolean() }),
    z.object({ t: z.literal("b"), b: z.string() }),
  ]),
});

async function counted(name, ask) {
  const errors = [];
  for (let seed = 0; seed < count; seed++) {
    try {
      await ask(seed);
    } catch (error) {
      errors.push(`${error.name}: ${error.message} ${error.text ?? ""} ${error.cause?.message ?? ""}`.slice(0, 400));
    }
  }
  const valid = count - errors.length;
  console.log(JSON.stringify({ case: name, valid, of: count, errors: errors.slice(0, 3) }));
}

const common = { prompt, maxRetries: 0, temperature: 1 };

for (const [name, schema] of Object.entries({ person, scene })) {
  await counted(`generateObject, ${name}`, (seed) =>
    generateObject({ ...common, model: model(true), schema, seed }),
  );
}
await counted("streamObject, scene", async (seed) => {
  const result = streamObject({ ...common, model: model(true), schema: scene, seed, onError() {} });
  for await (const _ of result.partialObjectStream);
  await result.object;
});
await counted('generateText, toolChoice "required"', async (seed) => {
  const tools = {
    person: tool({ description: "A person", inputSchema: person }),
    scene: tool({ description: "A scene", inputSchema: scene }),
  };
  const { toolCalls } = await generateText({
    ...common,
    model: model(false),
    tools,
    toolChoice: "required",
    seed,
  });
  if (toolCalls.length === 0) throw new Error("no call");
  const bad = toolCalls.find((call) => call.invalid);
  if (bad) throw new Error(`invalid call: ${bad.error}`);
});
