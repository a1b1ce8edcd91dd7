// How an answer is computed

import { say } from './dom.js';
import { Failure, events, request } from './requests.js';
import { modelOf, state } from './state.js';
import { count, isObject, readInfo, save, settings, text } from './store.js';
import { paint, requestPaint, shown } from './view.js';

/** Lets the model write the last message of a conversation: an answer, or a text's continuation. Gives the model. */
export async function run(conversation) {
  const message = conversation.messages.at(-1);
  const model = modelOf(conversation);
  if (conversation.run || !model) return null;
  const isText = conversation.kind === 'text';
  const control = new AbortController();
  // Each request has a seed that the page shows, so that every answer can be asked for again.
  const seed = settings.sampling.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const info = readInfo({ model: model.id, seed, before: isText ? message.content.length : undefined });
  message.info = info;
  conversation.model = model.id;
  conversation.updated = Date.now();
  conversation.run = { control, started: performance.now(), first: 0, last: 0, pieces: 0, wake: !model.loaded, said: message.content.length };
  save(conversation);
  say();
  shown(conversation);

  const progress = conversation.run;
  const timer = setInterval(() => {
    paint(conversation);
    if (progress.pieces) save(conversation);
  }, 1000);
  const body = { model: model.id, ...settings.sampling, seed, stream: true, stream_options: { include_usage: true } };
  if (isText) {
    body.prompt = message.content;
    body.max_tokens ??= 200;
  } else {
    body.messages = conversation.messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
    if (conversation.system.trim()) body.messages.unshift({ role: 'system', content: conversation.system });
  }
  try {
    const response = await request(isText ? 'v1/completions' : 'v1/chat/completions', body, control.signal);
    let complete = false;
    for await (const data of events(response)) {
      if (data === '[DONE]') {
        complete = true;
        break;
      }
      receive(conversation, message, JSON.parse(data));
    }
    if (!complete) throw new Failure('The connection ended before the answer was complete.');
    info.end ||= 'stop';
  } catch (error) {
    // The server's facts come at the end of a stream. Without them the page counts for itself.
    if (progress.pieces > 1) info.speed ??= (progress.pieces - 1) / ((progress.last - progress.first) / 1000 || 1);
    info.end = control.signal.aborted ? 'stopped' : 'error';
    if (info.end === 'error') {
      const known = error instanceof Failure;
      info.error = known ? error.message : error instanceof SyntaxError ? 'The server sent something that is no JSON.' : 'The connection broke before the answer was complete.';
      if (known && error.wait) conversation.retryAt = Date.now() + error.wait * 1000;
    }
    control.abort();
  } finally {
    clearInterval(timer);
    conversation.run = null;
    conversation.updated = Date.now();
    save(conversation);
    shown(conversation, message.content.slice(progress.said));
  }
  return model;
}

/** One chunk of a stream. */
function receive(conversation, message, chunk) {
  if (!isObject(chunk)) throw new SyntaxError();
  const { run: progress } = conversation;
  const { info } = message;
  if (chunk.error) throw new Failure(text(chunk.error.message) || 'The server stopped with an error.');
  const choice = chunk.choices?.[0];
  const piece = text(choice?.delta?.content ?? choice?.text);
  if (piece) {
    progress.last = performance.now();
    progress.first ||= progress.last;
    progress.pieces++;
    message.content += piece;
    if (conversation === state.current) requestPaint();
  }
  if (choice?.finish_reason) info.end = text(choice.finish_reason);
  if (chunk.usage) {
    info.prompt = count(chunk.usage.prompt_tokens);
    info.tokens = count(chunk.usage.completion_tokens);
    info.cached = count(chunk.usage.prompt_tokens_details?.cached_tokens);
  }
  if (chunk.bitnet) {
    const { receipt, kernels, first_token_seconds: first, decode_tokens_per_second: speed } = chunk.bitnet;
    Object.assign(info, readInfo({ ...info, receipt, kernels, first, speed }));
  }
}

export const stop = () => state.current.run?.control.abort();
