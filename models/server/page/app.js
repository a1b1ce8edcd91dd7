// The chat page of `bitnet serve`: plain JavaScript, no libraries, no build step.
//
// The parts, in this order: small helpers; what the browser keeps; requests to the server; Markdown; how an answer is
// computed; what is shown; what the controls do. Texts of models and users are untrusted. They reach the page as text nodes
// only, never as HTML.

const $ = (id) => document.getElementById(id);

/** A new element with a class and children (elements or texts). */
function element(tag, className = '', ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);
const number = (value, digits = 0) => value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits });
const touch = matchMedia('(pointer: coarse)');
const narrow = matchMedia('(max-width: 52rem)');

// ---------------------------------------------------------------------------------------------------------------------
// What the browser keeps: each conversation under a key of its own, and the settings. What is read back is checked, since
// other versions of this page, other tabs and people write there, too.

const PREFIX = 'bitnet.conversation.';
const SETTINGS = 'bitnet.settings';
const SAMPLING = ['temperature', 'max_tokens', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'seed'];

/** The browser's storage, or null where it is switched off. */
function storage(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}
const local = storage('localStorage');
const perTab = storage('sessionStorage');

const isObject = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);
const text = (value) => (typeof value === 'string' ? value : '');
const count = (value) => (Number.isFinite(value) && value >= 0 ? value : undefined);

/** What is known of an answer. Unknown facts are left out. */
function readInfo(value) {
  const info = isObject(value) ? value : {};
  const read = { kernels: Array.isArray(info.kernels) ? info.kernels.filter((name) => typeof name === 'string') : [] };
  for (const key of ['model', 'end', 'error', 'receipt']) read[key] = text(info[key]);
  for (const key of ['seed', 'prompt', 'cached', 'tokens', 'speed', 'first', 'before']) read[key] = count(info[key]);
  return read;
}

/** A conversation from its stored JSON; null if the JSON describes no conversation. */
function readConversation(id, json) {
  let value;
  try {
    value = JSON.parse(json);
  } catch {
    return null;
  }
  if (!isObject(value) || !Array.isArray(value.messages) || !/^[0-9a-f]{16}$/.test(id)) return null;
  const kind = value.kind === 'text' ? 'text' : 'chat';
  const messages = [];
  for (const message of value.messages) {
    // A chat alternates between user and assistant; a text is one message.
    const role = kind === 'text' ? 'text' : messages.length % 2 ? 'assistant' : 'user';
    if (!isObject(message) || message.role !== role || typeof message.content !== 'string') break;
    const read = { role, content: message.content, info: readInfo(message.info) };
    // An answer without an end was being written when the page closed.
    if (role === 'assistant' && !read.info.end) read.info.end = 'stopped';
    messages.push(read);
  }
  if (!messages.length) return null;
  if (kind === 'chat' && messages.length % 2) messages.push({ role: 'assistant', content: '', info: readInfo({ end: 'stopped' }) });
  if (kind === 'text') messages.length = 1;
  return { id, kind, title: text(value.title).slice(0, 200), model: text(value.model), system: text(value.system), updated: count(value.updated) ?? 0, messages };
}

function readSettings() {
  let value;
  try {
    value = JSON.parse(local?.getItem(SETTINGS));
  } catch {
    value = null;
  }
  const settings = { model: text(value?.model), system: text(value?.system), sampling: {} };
  for (const name of SAMPLING) {
    const field = $(name);
    field.value = count(value?.sampling?.[name]) ?? '';
    if (field.value && field.validity.valid) settings.sampling[name] = Number(field.value);
    else field.value = '';
  }
  return settings;
}

/** All conversations of the browser, and those of this page that the browser could not take. */
const conversations = new Map();
function readConversations() {
  for (let i = 0; i < (local?.length ?? 0); i++) {
    const key = local.key(i);
    const found = key.startsWith(PREFIX) && readConversation(key.slice(PREFIX.length), local.getItem(key));
    if (found && !conversations.get(found.id)?.run) conversations.set(found.id, found);
  }
}

let full = false;
function write(key, value) {
  try {
    local?.setItem(key, JSON.stringify(value));
    full = false;
  } catch {
    if (!full) notice('The browser’s storage is full. Changes are lost when the page closes. Delete old conversations to make room.');
    full = true;
  }
}
function save(conversation) {
  const { id, kind, title, model, system, updated, messages } = conversation;
  if (conversations.has(id)) write(PREFIX + id, { kind, title, model, system, updated, messages });
}
function forget({ id }) {
  conversations.delete(id);
  local?.removeItem(PREFIX + id);
}
const saveSettings = () => write(SETTINGS, settings);

function newConversation(kind) {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('');
  const messages = kind === 'text' ? [{ role: 'text', content: '', info: readInfo() }] : [];
  return { id, kind, title: '', model: settings.model, system: settings.system, updated: 0, messages };
}
const isEmpty = (conversation) => !conversation.messages[0]?.content;
function title(conversation) {
  const line = (conversation.messages[0]?.content ?? '').trim().split('\n')[0];
  return conversation.title || line.slice(0, 80) || 'New conversation';
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests to the server

/** An error that is told to the user; `wait` is how many seconds the server asks to wait. */
class Failure extends Error {
  constructor(message, wait) {
    super(message);
    this.wait = wait;
  }
}

let key = text(perTab?.getItem('bitnet.key'));
let asking = null;

/** Asks for the server's key, once for all requests that wait for it. */
function askForKey(refused) {
  asking ??= new Promise((resolve, reject) => {
    if (refused) $('key-why').textContent = 'The server refused this key. It wants the one that bitnet serve was started with.';
    $('key-value').value = '';
    $('key').returnValue = '';
    $('key').onclose = () => {
      asking = null;
      if ($('key').returnValue !== 'use') return reject(new Failure('The server answers only with its key.'));
      const typed = $('key-value').value.trim();
      key = /^[!-~]*$/.test(typed) ? typed : ''; // Other characters cannot be sent in a header.
      try {
        perTab?.setItem('bitnet.key', key);
      } catch {
        // The key is kept for as long as the page is open.
      }
      resolve();
    };
    $('key').showModal();
  });
  return asking;
}

/** The server's answer to a request. `body` makes it a POST. Throws a Failure, or the AbortError of `signal`. */
async function request(path, body, signal) {
  for (;;) {
    const used = key;
    const headers = { ...(body && { 'Content-Type': 'application/json' }), ...(used && { Authorization: `Bearer ${used}` }) };
    let response;
    try {
      response = await fetch(path, { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body), signal, cache: 'no-store' });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new Failure('The server cannot be reached. Is bitnet serve still running?');
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (used === key) await askForKey(Boolean(used));
      continue;
    }
    const said = text((await response.json().catch(() => null))?.error?.message);
    const wait = Number(response.headers.get('Retry-After')) || undefined;
    const busy = response.status === 429 && `The server is busy${wait ? ` and asks to wait ${wait} ${wait === 1 ? 'second' : 'seconds'}` : ''}. ${said}`;
    throw new Failure(busy || said || `The server answered with status ${response.status}.`, wait);
  }
}

/** The data of each event of a stream (SSE). */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith('data:')).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join('\n');
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Markdown, the small part that answers use: paragraphs, headings, lists, code, bold, italics. Links and pictures stay text.

const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const FENCE = /^\s*(`{3,}|~{3,})(.*)$/;

/** The blocks of a text: {kind, lines, note}. */
function blocks(source) {
  const found = [];
  let block = null;
  let fence = null;
  const start = (kind, note = '') => found.push((block = { kind, note, lines: [] }));
  for (const line of source.split('\n')) {
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && !mark[2].trim() && mark[1].startsWith(fence)) block = fence = null;
      else block.lines.push(line);
    } else if (mark && !mark[2].includes('`')) {
      fence = mark[1];
      start('code', mark[2].trim().split(/\s/)[0]);
    } else if (/^ {0,3}#{1,6}\s/.test(line)) {
      start('heading', String(line.trim().indexOf(' ')));
      block.lines.push(line.trim().replace(/^#+\s+/, ''));
      block = null;
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      start('rule');
      block = null;
    } else if (ITEM.test(line)) {
      if (block?.kind !== 'list') start('list');
      block.lines.push(line);
    } else if (!line.trim()) {
      // A list may have blank lines between its items.
      if (block?.kind === 'list') block.blank = true;
      else block = null;
    } else {
      if (!block || (block.blank && block.lines.at(-1) && !/^\s/.test(line))) start('text');
      block.lines.push(line);
    }
    if (line.trim() && block) block.blank = false;
  }
  return found;
}

/** Bold, italics and code of a line or paragraph. Marks without a partner stay as they are. */
function inline(source) {
  if (source.length > 20000) return [source]; // So many marks could freeze the browser.
  const parts = [];
  const alone = new Set(); // Marks without a partner in the rest of the text, which is then searched only once.
  let plain = 0;
  let at = 0;
  const take = (end, next, made) => {
    parts.push(source.slice(plain, end), made);
    plain = at = next;
  };
  while (at < source.length) {
    const mark = source[at] === '`' ? /`+/y : /\*{1,3}/y;
    mark.lastIndex = at;
    const [open] = mark.exec(source) ?? [''];
    const from = at + open.length;
    let close = open && !alone.has(open) ? source.indexOf(open, from) : -1;
    if (open && close < 0) alone.add(open);
    // Emphasis begins and ends at a word: `2 * 3 * 4` has none.
    if (close > 0 && open[0] === '*' && (close === from || /\s/.test(source[from]) || /\s/.test(source[close - 1]))) close = -1;
    if (close < 0) at = from + (open ? 0 : 1);
    else if (open[0] === '`') take(at, close + open.length, element('code', '', source.slice(from, close).trim()));
    else {
      const inner = inline(source.slice(from, close));
      const italics = open.length === 2 ? inner : [element('em', '', ...inner)];
      take(at, close + open.length, open.length === 1 ? italics[0] : element('strong', '', ...italics));
    }
  }
  parts.push(source.slice(plain));
  return parts.filter((part) => part !== '');
}

function list(lines) {
  const open = []; // From the outer list to the inner one: {indent, made}.
  const items = [];
  let first = null;
  for (const line of lines) {
    const [, space, ordinal, content] = ITEM.exec(line) ?? [];
    if (space === undefined) {
      items.at(-1).source += `\n${line.trim()}`;
      continue;
    }
    const indent = space.replaceAll('\t', '    ').length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    const tag = ordinal === undefined ? 'UL' : 'OL';
    const deeper = !open.length || indent > open.at(-1).indent + 1;
    if ((deeper && open.length < 8) || open.at(-1).made.tagName !== tag) {
      const made = element(tag);
      if (ordinal !== undefined) made.start = Number(ordinal);
      if (!open.length) first = element('div', '', made);
      else if (deeper && open.length < 8) items.at(-1).item.append(made);
      else open.pop().made.after(made);
      open.push({ indent, made });
    }
    const body = element('span');
    const item = element('li', '', body);
    open.at(-1).made.append(item);
    items.push({ item, body, source: content });
  }
  for (const { body, source } of items) body.append(...inline(source));
  return first;
}

const RENDER = {
  text: ({ lines }) => element('p', '', ...inline(lines.join('\n'))),
  heading: ({ lines, note }) => element(`h${Math.min(6, Number(note) + 2)}`, '', ...inline(lines[0])),
  rule: () => element('hr'),
  list: ({ lines }) => list(lines),
  code: ({ lines, note }) => {
    const code = element('code', '', lines.join('\n'));
    const pre = element('pre', '', code);
    pre.tabIndex = 0; // Long lines are scrolled with the keyboard, too.
    pre.setAttribute('role', 'group');
    pre.setAttribute('aria-label', 'Code');
    return element('div', 'code', element('div', 'actions', element('span', '', note || 'code'), copyButton(() => code.textContent)), pre);
  },
};

/** Shows a text. Blocks that are the same as before stay, so that a selection survives while an answer grows. */
function render(into, source) {
  const all = blocks(source);
  all.forEach((block, i) => {
    const same = JSON.stringify(block);
    const old = into.children[i];
    if (old?.block === same) return;
    const made = RENDER[block.kind](block);
    made.block = same;
    if (old) old.replaceWith(made);
    else into.append(made);
  });
  while (into.children.length > all.length) into.lastChild.remove();
}

function copyButton(what, button = element('button', 'copy', 'Copy')) {
  button.type = 'button';
  // Browsers give the clipboard to pages from this machine or over TLS only.
  button.hidden = !navigator.clipboard;
  button.onclick = async () => {
    const done = await navigator.clipboard.writeText(what()).then(() => 'Copied', () => 'Not copied');
    button.textContent = done;
    say(done);
    setTimeout(() => (button.textContent = 'Copy'), 1500);
  };
  return button;
}

// ---------------------------------------------------------------------------------------------------------------------
// How an answer is computed

let settings = readSettings();
let models = []; // {id, chat, context, loaded}; chat and context are unknown until a model is loaded.
let current = null;

const kindOf = (model) => (model.chat === false ? 'text' : 'chat');
/** The model that continues a conversation: its own one, or the chosen one, or the first of its kind. */
function modelOf(conversation) {
  const fit = models.filter((model) => kindOf(model) === conversation.kind);
  return fit.find(({ id }) => id === conversation.model) ?? fit.find(({ id }) => id === settings.model) ?? fit[0];
}

/** Lets the model write the last message of a conversation: an answer, or a text's continuation. */
async function run(conversation) {
  const message = conversation.messages.at(-1);
  const model = modelOf(conversation);
  if (conversation.run || !model) return;
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
  if (model.loaded && model.chat !== undefined) return;
  // Now the server knows more of this model. If it turns out to have no chat template, the question becomes a text.
  await loadModels();
  if (kindOf(models.find(({ id }) => id === model.id) ?? model) === conversation.kind || conversation !== current || conversation.messages.length > 2) return;
  forget(conversation);
  const [question] = conversation.messages;
  begin('text');
  current.messages[0].content = question.content;
  keep(current);
  save(current);
  show(current);
  notice(`${model.id} has no chat template. It continues texts.`);
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
    if (conversation === current) requestPaint();
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

const stop = () => current.run?.control.abort();

// ---------------------------------------------------------------------------------------------------------------------
// What is shown

let bodies = new Map(); // Message -> its element in the page.
let atEnd = true;
let painting = false;

/** Tells people who use a screen reader; without a text, forgets what was said. */
function say(words) {
  if (words === undefined) $('live').replaceChildren();
  else if (words.trim()) $('live').append(element('p', '', words.replace(/[*`#]/g, '').trim()));
}

function notice(words, again) {
  $('notice').hidden = !words;
  $('notice').firstElementChild.textContent = words;
  $('notice-again').hidden = !again;
  $('notice-again').onclick = () => {
    notice('');
    again();
  };
}

/** What is known of an answer: its speed, tokens, kernels and receipt, or what went wrong. */
function showOutcome(outcome, conversation, message, last) {
  const { info } = message;
  const progress = last ? conversation.run : null;
  const [waiting, failure, facts] = outcome.children;
  waiting.hidden = !progress;
  if (progress) {
    const now = performance.now();
    const rate = progress.pieces > 4 ? ` · about ${number((progress.pieces - 1) / ((now - progress.first) / 1000), 1)} tokens/s` : '';
    const seconds = Math.floor((now - progress.started) / 1000);
    const words = progress.pieces ? `Writing${rate}` : `${progress.wake ? 'Loading the model' : 'Reading the prompt'}${seconds ? ` · ${seconds} s` : ''}`;
    if (waiting.textContent !== words) waiting.textContent = words;
  }
  failure.hidden = Boolean(progress) || !info.error;
  failure.firstElementChild.textContent = info.error;
  const retry = failure.lastElementChild;
  const wait = last ? Math.ceil(((conversation.retryAt ?? 0) - Date.now()) / 1000) : 0;
  retry.hidden = !last;
  retry.textContent = wait > 0 ? `Try again (in ${wait} s)` : 'Try again';
  retry.onclick = () => again(conversation);
  if (wait > 0 && !failure.hidden) setTimeout(() => outcome.isConnected && showOutcome(outcome, conversation, message, last), 1000);

  facts.hidden = Boolean(progress) || !info.end || (Boolean(info.error) && !message.content);
  if (facts.hidden) return;
  const ends = { length: 'cut at the limit', stopped: message.content ? 'stopped' : 'stopped before the first token', error: 'incomplete', stop: message.content ? '' : 'empty answer' };
  const counted = info.tokens === undefined; // By the page
  const summary = [
    info.speed !== undefined && `${counted ? 'about ' : ''}${number(info.speed, 1)} tokens/s`,
    info.tokens !== undefined && `${number(info.tokens)} ${info.tokens === 1 ? 'token' : 'tokens'}`,
    info.kernels.length && info.kernels[0] + (info.kernels.length > 1 ? ` +${info.kernels.length - 1}` : ''),
    ends[info.end] ?? info.end,
  ];
  const rows = {
    Model: info.model,
    Kernels: info.kernels.join(', '),
    'First token': info.first !== undefined && `after ${number(info.first, 2)} s`,
    Prompt: info.prompt !== undefined && `${number(info.prompt)} tokens${info.cached ? `, ${number(info.cached)} of them from the cache` : ''}`,
    Seed: info.seed !== undefined && String(info.seed),
  };
  const details = facts.querySelector('details');
  details.firstElementChild.textContent = summary.filter(Boolean).join(' · ') || 'Details';
  details.lastElementChild.replaceChildren(...Object.entries(rows).filter(([, value]) => value).flatMap(([name, value]) => [element('dt', '', name), element('dd', '', value)]));
  details.ontoggle = () => atEnd && toEnd();
  details.hidden = !Object.values(rows).some(Boolean) && !summary.some(Boolean);
  const receipt = facts.querySelector('.receipt');
  receipt.hidden = !info.receipt;
  receipt.href = `v1/receipts/${encodeURIComponent(info.receipt)}`;
  receipt.onclick = (event) => showReceipt(event, info.receipt);
  copyButton(() => message.content, facts.querySelector('.copy')).hidden ||= !message.content || message.role === 'text';
  facts.querySelector('.regenerate').hidden = !last || Boolean(info.error) || message.role === 'text';
  facts.querySelector('.regenerate').onclick = () => again(conversation);
}

/** Brings the running answer up to date. */
function paint(conversation = current) {
  painting = false;
  if (conversation !== current) return;
  const message = current.messages.at(-1);
  if (current.kind === 'text') {
    const field = $('text');
    const old = field.value;
    // What is appended moves neither the selection nor the place that the user reads.
    if (old && message.content.startsWith(old)) field.setRangeText(message.content.slice(old.length), old.length, old.length, 'preserve');
    else if (old !== message.content) field.value = message.content;
    if (current.run && atEnd) field.scrollTop = field.scrollHeight;
    showOutcome($('text-outcome').firstElementChild, current, message, true);
  } else if (message) {
    const body = bodies.get(message);
    render(body.firstElementChild, message.content);
    showOutcome(body.lastElementChild, current, message, true);
    if (atEnd) toEnd();
  }
  // A screen reader gets whole paragraphs.
  const { run: progress } = current;
  const whole = progress && message.content.lastIndexOf('\n\n');
  if (progress && whole > progress.said) {
    say(message.content.slice(progress.said, whole));
    progress.said = whole;
  }
}
function requestPaint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => paint());
}

function toEnd() {
  $('log').scrollTop = $('log').scrollHeight;
}

/** A run began or ended: its conversation, the list and the controls are brought up to date. `unsaid` is for screen readers. */
function shown(conversation, unsaid) {
  showList();
  if (conversation !== current) return;
  const message = conversation.messages.at(-1);
  if (conversation.run) {
    conversation.retryAt = 0;
    atEnd = true;
  } else if (message) {
    const { info } = message;
    say(unsaid);
    say(info.error || ({ stop: 'The answer is complete.', length: 'The answer was cut at the limit.', stopped: 'Stopped.' }[info.end] ?? ''));
  }
  show(conversation);
}

function question(conversation, message, i) {
  const made = copyOf('t-question');
  made.firstElementChild.textContent = message.content;
  copyButton(() => message.content, made.querySelector('.copy'));
  made.querySelector('.edit').onclick = () => edit(conversation, message, i, made);
  return made;
}

function answer() {
  const made = copyOf('t-answer');
  made.append(copyOf('t-outcome'));
  return made;
}

function welcome(model) {
  const icon = copyOf('t-entry').querySelector('svg');
  icon.firstElementChild.setAttribute('href', '#i-mark');
  return element('div', 'welcome', icon, element('h2', '', model ? `Chat with ${model.id}` : 'bitnet'), element('p', '', model?.context ? `Its context has room for ${number(model.context)} tokens.` : ''));
}

function showTitle() {
  document.title = isEmpty(current) ? 'bitnet' : `${title(current)} · bitnet`;
  $('heading').textContent = title(current);
}

/** Shows a conversation from its beginning to its end. */
function show(conversation) {
  const changed = current !== conversation;
  current = conversation;
  const model = modelOf(conversation);
  const isText = conversation.kind === 'text';
  const { messages } = conversation;
  const running = Boolean(conversation.run);
  showTitle();
  $('model').value = model?.id ?? '';
  $('chat').hidden = isText;
  $('editor').hidden = !isText;
  $('system-field').hidden = isText;
  $('system').value = conversation.system;

  const send = $('send');
  send.setAttribute('aria-label', (send.title = running ? 'Stop' : 'Send'));
  send.querySelector('use').setAttribute('href', running ? '#i-stop' : '#i-send');
  if (isText) {
    const { info } = messages[0];
    $('text').readOnly = running;
    $('continue').textContent = running ? 'Stop' : 'Continue';
    $('undo').disabled = $('another').disabled = running || info.before === undefined;
    if (changed) $('text-outcome').replaceChildren(copyOf('t-outcome'));
  } else {
    // What is in the page already stays there, with its selection and focus.
    const old = changed ? new Map() : bodies;
    bodies = new Map(messages.map((message, i) => [message, old.get(message) ?? (message.role === 'user' ? question(conversation, message, i) : answer())]));
    messages.forEach((message, i) => {
      if (message.role === 'user') return;
      const [prose, outcome] = bodies.get(message).children;
      render(prose, message.content);
      showOutcome(outcome, conversation, message, i === messages.length - 1);
    });
    const parts = [...bodies.values()];
    if (!parts.length) parts.push(welcome(model));
    const system = conversation.system.trim();
    $('system-open').hidden = !system;
    $('system-open').textContent = `System prompt: ${system}`;
    const place = $('messages');
    place.classList.toggle('busy', running);
    parts.forEach((part, i) => place.children[i] !== part && place.insertBefore(part, place.children[i] ?? null));
    while (place.children.length > parts.length) place.lastChild.remove();
    if (changed) {
      $('message').value = conversation.draft ?? '';
      fit($('message'));
    }
  }
  if (changed) atEnd = true;
  paint();
  showList();
  if (models.length && !model) notice(`This server has no model that could continue this ${isText ? 'text' : 'conversation'}.`);
}

/** The list of conversations, the newest first. */
function showList() {
  const places = $('list');
  if (places.querySelector('input')) return; // One is being renamed.
  const focus = document.activeElement.dataset.focus;
  const newest = [...conversations.values()].sort((a, b) => b.updated - a.updated);
  places.replaceChildren(...newest.map((conversation) => {
    const made = copyOf('t-entry');
    const [link, rename, remove] = made.children;
    const name = title(conversation);
    made.classList.toggle('current', conversation === current);
    link.href = `#${conversation.id}`;
    link.textContent = link.title = name;
    link.classList.toggle('busy', Boolean(conversation.run));
    if (conversation === current) link.setAttribute('aria-current', 'page');
    link.onclick = closeSide;
    rename.onclick = () => startRename(conversation, link);
    remove.onclick = () => askToDelete(conversation);
    [link, rename, remove].forEach((control, i) => (control.dataset.focus = `${conversation.id} ${i}`));
    rename.setAttribute('aria-label', (rename.title = `Rename “${name}”`));
    remove.setAttribute('aria-label', (remove.title = `Delete “${name}”`));
    return made;
  }));
  if (focus) places.querySelector(`[data-focus="${focus}"]`)?.focus();
}

/** Makes a field as high as its text. */
function fit(field) {
  // Without a scroll bar, which would make the lines shorter.
  field.style.overflow = 'hidden';
  field.style.height = 'auto';
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
  field.style.overflow = field.scrollHeight > field.clientHeight ? 'auto' : 'hidden';
}

// ---------------------------------------------------------------------------------------------------------------------
// What the controls do

/** On a phone, focus would open the keyboard over the answer. */
const focusField = () => touch.matches || $(current.kind === 'text' ? 'text' : 'message').focus();

function begin(kind = current?.kind ?? 'chat') {
  if (location.hash) history.pushState(null, '', location.pathname + location.search);
  notice('');
  show(newConversation(kind));
  closeSide();
  focusField();
}

/** Shows the conversation that the address names, or a new one. */
function openFromAddress() {
  const found = conversations.get(location.hash.slice(1));
  if (found && found === current) return;
  notice('');
  const model = models.find(({ id }) => id === settings.model) ?? models[0];
  show(found ?? newConversation(model ? kindOf(model) : 'chat'));
  closeSide();
  focusField();
}

/** Puts a conversation into the list and the address, so that it is there after a reload. */
function keep(conversation) {
  conversations.set(conversation.id, conversation);
  if (location.hash.slice(1) !== conversation.id) history.replaceState(null, '', `#${conversation.id}`);
}

function start(conversation) {
  keep(conversation);
  conversation.retryAt = 0;
  focusField();
  return run(conversation);
}

/** Adds the user's message and an answer that is still empty. */
function ask(conversation, content) {
  conversation.messages.push({ role: 'user', content, info: readInfo() }, { role: 'assistant', content: '', info: readInfo() });
  start(conversation);
}

/** Computes the last answer, or the last continuation, once more. */
async function again(conversation) {
  const message = conversation.messages.at(-1);
  if (conversation.run) return;
  if (!modelOf(conversation)) return loadModels();
  const { content, info } = message;
  message.content = conversation.kind === 'text' ? content.slice(0, info.before) : '';
  const without = message.content;
  await start(conversation);
  // If nothing came, the earlier answer stays.
  if (!message.info.error || message.content !== without || content === without) return;
  message.content = content;
  message.info = { ...info, error: message.info.error };
  save(conversation);
  if (conversation === current) show(conversation);
}

function send() {
  if (current.run) return stop();
  const content = $('message').value.trim();
  if (!content) return $('message').focus();
  if (!modelOf(current)) return loadModels();
  $('message').value = current.draft = '';
  fit($('message'));
  ask(current, content);
}

function edit(conversation, message, i, made) {
  if (conversation.run) return;
  const form = copyOf('t-edit');
  const field = form.querySelector('textarea');
  const end = () => {
    const back = question(conversation, message, i);
    bodies.set(message, back);
    made.replaceWith(back);
    back.querySelector('.edit').focus();
  };
  const resend = () => {
    const content = field.value.trim();
    if (!content || conversation.run) return field.focus();
    if (!modelOf(conversation)) return loadModels();
    conversation.messages.length = i;
    ask(conversation, content);
  };
  field.value = message.content;
  field.oninput = () => fit(field);
  field.onkeydown = (event) => {
    if (sends(event)) resend();
    else if (event.key === 'Escape') end();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  form.querySelector('.cancel').onclick = end;
  form.querySelector('.save').onclick = resend;
  made.replaceChildren(form);
  fit(field);
  field.focus();
}

/** Whether a key press sends the message. A phone's keyboard has no Shift+Enter, so there Enter starts a line. */
function sends(event) {
  return event.key === 'Enter' && !event.isComposing && (event.ctrlKey || event.metaKey || (!event.shiftKey && !touch.matches));
}

function continueText() {
  if (current.run) return stop();
  if (!$('text').value) return $('text').focus();
  if (!modelOf(current)) return loadModels();
  atEnd = true;
  start(current);
}

function startRename(conversation, link) {
  const field = element('input');
  field.value = title(conversation);
  field.maxLength = 200;
  field.setAttribute('aria-label', 'Name of the conversation');
  let done = false;
  const finish = (keep, focus) => {
    if (done) return;
    done = true;
    if (keep) {
      conversation.title = field.value.trim();
      save(conversation);
    }
    field.remove();
    showList();
    showTitle();
    if (focus) $('list').querySelector(`[data-focus="${conversation.id} 1"]`)?.focus();
  };
  field.onblur = () => finish(true, false);
  field.onkeydown = (event) => {
    if (event.isComposing || !['Enter', 'Escape'].includes(event.key)) return;
    event.stopPropagation();
    event.preventDefault(); // Otherwise the key also acts on what gets the focus.
    finish(event.key === 'Enter', true);
  };
  link.replaceWith(field);
  field.focus();
  field.select();
}

function askToDelete(conversation) {
  $('delete-what').textContent = `“${title(conversation)}” cannot be brought back.`;
  $('delete-yes').onclick = () => {
    $('delete').close();
    conversation.run?.control.abort();
    forget(conversation);
    if (conversation === current) begin();
    else showList();
    say('Deleted.');
    (narrow.matches ? $('menu') : $('new')).focus();
  };
  $('delete').showModal();
}

function openSide() {
  $('side').classList.add('open');
  $('shade').hidden = false;
  $('main').inert = true;
  $('menu').setAttribute('aria-expanded', 'true');
  $('new').focus();
}
function closeSide() {
  if (!$('side').classList.contains('open')) return;
  $('side').classList.remove('open');
  $('shade').hidden = true;
  $('main').inert = false;
  $('menu').setAttribute('aria-expanded', 'false');
  $('menu').focus();
}

function openSettings() {
  $('system').value = current.system;
  $('settings').showModal();
}

/** Keeps a field of the settings, if its value can be used. */
function changeSetting(field) {
  const help = $(`${field.id}-help`);
  help.dataset.help ??= help.textContent;
  const { valid } = field.validity;
  if (valid && field.value) settings.sampling[field.id] = Number(field.value);
  else delete settings.sampling[field.id];
  field.toggleAttribute('aria-invalid', !valid);
  if (!valid) field.setAttribute('aria-invalid', 'true');
  help.textContent = valid ? help.dataset.help : `Not used: ${field.validationMessage}`;
  saveSettings();
}

async function showReceipt(event, id) {
  // With Ctrl or Shift the browser opens a tab, as with any link.
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const link = $('receipt-save');
  link.hidden = true;
  $('receipt-text').textContent = 'Loading. The first receipt of a model takes longer, since its files are hashed.';
  $('receipt').showModal();
  try {
    const body = await (await request(`v1/receipts/${encodeURIComponent(id)}`)).text();
    $('receipt-text').textContent = body;
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new Blob([body], { type: 'application/json' }));
    link.download = `receipt-${id}.json`;
    link.hidden = false;
  } catch (error) {
    $('receipt-text').textContent = error instanceof Failure ? error.message : 'The connection broke.';
  }
}

function chooseModel(id) {
  const model = models.find((one) => one.id === id);
  settings.model = id;
  saveSettings();
  notice('');
  if (!isEmpty(current) && kindOf(model) === current.kind) {
    current.model = id;
    save(current);
    show(current);
  } else begin(kindOf(model));
}

async function loadModels() {
  try {
    const { data } = await (await request('v1/models')).json();
    models = data.filter((model) => typeof model?.id === 'string').map(({ id, bitnet }) => ({ id, chat: bitnet?.chat, context: count(bitnet?.context), loaded: bitnet?.loaded !== false }));
    if (!models.length) throw new Failure('The server has no model.');
  } catch (error) {
    models = [];
    notice(error instanceof Failure ? error.message : 'The server’s list of models cannot be read.', loadModels);
  }
  $('model').replaceChildren(...(models.length ? models : [{ id: 'No model' }]).map(({ id }) => new Option(id)));
  $('model').disabled = !models.length;
  if (!models.length) return;
  const kind = kindOf(models.find(({ id }) => id === settings.model) ?? models[0]);
  if (isEmpty(current) && kind !== current.kind) begin(kind);
  else show(current);
  if (document.activeElement === document.body) focusField();
}

$('send').onclick = send;
$('message').onkeydown = (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  if (!current.run) send();
};
$('message').oninput = () => {
  current.draft = $('message').value;
  fit($('message'));
};
$('continue').onclick = continueText;
$('another').onclick = () => again(current);
$('undo').onclick = () => {
  const [message] = current.messages;
  message.content = message.content.slice(0, message.info.before);
  message.info = readInfo();
  save(current);
  show(current);
  $('text').focus();
};
$('text').oninput = () => {
  const [message] = current.messages;
  message.content = $('text').value;
  if (message.content && !conversations.has(current.id)) keep(current);
  // What was known of the continuation no longer fits the text.
  message.info = readInfo();
  current.updated = Date.now();
  save(current);
  showList();
  paint();
  $('undo').disabled = $('another').disabled = true;
};
$('text').onkeydown = (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (!current.run) continueText();
};
for (const box of [$('log'), $('text')]) {
  box.onscroll = () => {
    atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
    $('to-end').hidden = atEnd;
  };
}
$('to-end').onclick = () => {
  toEnd();
  focusField();
};
$('new').onclick = $('new-small').onclick = () => begin();
$('menu').onclick = openSide;
$('shade').onclick = closeSide;
narrow.onchange = closeSide;
$('model').onchange = () => chooseModel($('model').value);
$('settings-open').onclick = $('system-open').onclick = openSettings;
$('system').oninput = () => {
  current.system = settings.system = $('system').value;
  saveSettings();
  save(current);
};
$('settings').onclose = () => show(current);
for (const name of SAMPLING) $(name).oninput = () => changeSetting($(name));
$('settings-reset').onclick = () => {
  for (const name of SAMPLING) {
    $(name).value = '';
    changeSetting($(name));
  }
};
$('key-use').onclick = () => $('key').close('use');
$('key-value').onkeydown = (event) => {
  if (event.key !== 'Enter') return;
  event.preventDefault();
  $('key').close('use');
};
for (const button of document.querySelectorAll('dialog .close')) button.onclick = () => button.closest('dialog').close();
$('notice-close').onclick = () => notice('');
document.onkeydown = (event) => {
  if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
  if ($('side').classList.contains('open')) closeSide();
  else stop();
};
window.onhashchange = openFromAddress;
// A page that closes stops its answers, or the browser would break them, and they would count as failed.
window.onbeforeunload = () => conversations.forEach((conversation) => conversation.run?.control.abort());
window.onpagehide = () => conversations.forEach((conversation) => conversation.run && save(conversation));
// Another tab wrote. Texts that this tab is working on stay.
window.onstorage = ({ key: changed, newValue }) => {
  if (!changed?.startsWith(PREFIX)) return;
  const id = changed.slice(PREFIX.length);
  if (conversations.get(id)?.run) return;
  const found = newValue && readConversation(id, newValue);
  if (found) conversations.set(id, found);
  else conversations.delete(id);
  if (id === current.id && found) show(found);
  else showList();
};

readConversations();
show(conversations.get(location.hash.slice(1)) ?? newConversation('chat'));
if (!local) notice('This browser keeps no data for this page. Conversations end when the page closes.');
loadModels();
