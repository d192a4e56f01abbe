import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { BRAND, MODEL, PICTURE, QUESTION, SIZES, TEXT, URL, check, fails, picked, run } from "./common.mjs";

const url = `${URL}/v1`;
// The three ways in which the package reaches a server: chat completions, responses, messages.
const ways = [
  createOpenAICompatible({ name: "qvl", baseURL: url, apiKey: "none", supportsStructuredOutputs: true }),
  createOpenAI({ baseURL: url, apiKey: "none" }),
  createAnthropic({ baseURL: url, apiKey: "none" }),
];
const schema = z.object({ size: z.enum(SIZES) });
const seen = [
  { role: "user", content: [{ type: "image", image: PICTURE, mediaType: "image/png" }, { type: "text", text: QUESTION }] },
];
const common = { maxRetries: 0, maxOutputTokens: 64 };

async function each(attempt) {
  for (const way of ways) await attempt(way(MODEL));
}

await run("ai", {
  text: () => each(async (model) => check((await generateText({ ...common, model, prompt: QUESTION })).text, TEXT)),
  picture: () => each(async (model) => check((await generateText({ ...common, model, messages: seen })).text, BRAND)),
  stream: () =>
    each(async (model) => {
      let text = "";
      for await (const piece of streamText({ ...common, model, messages: seen }).textStream) text += piece;
      check(text, BRAND);
    }),
  tools: () =>
    each(async (model) => {
      const tools = { pick_size: tool({ description: "Picks", inputSchema: schema }) };
      const told = await generateText({ ...common, model, prompt: "Pick.", tools, toolChoice: { type: "tool", toolName: "pick_size" } });
      picked(told.toolCalls[0].input);
    }),
  structured: () =>
    each(async (model) => {
      picked((await generateText({ ...common, model, prompt: "Pick.", output: Output.object({ schema }) })).output);
    }),
  error: () => fails(() => generateText({ ...common, model: ways[0]("nope"), prompt: "x" }), 404),
});
