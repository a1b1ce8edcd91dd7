// What is shown of a conversation

import { $, copyButton, copyOf, element, fit, notice, number, say } from './dom.js';
import { handlers } from './handlers.js';
import { showList, showTitle } from './list.js';
import { render } from './markdown.js';
import { modelOf, state } from './state.js';

let bodies = new Map(); // Message -> its element in the page.
let painting = false;

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
  retry.onclick = () => handlers.again(conversation);
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
  details.ontoggle = () => state.atEnd && toEnd();
  details.hidden = !Object.values(rows).some(Boolean) && !summary.some(Boolean);
  const receipt = facts.querySelector('.receipt');
  receipt.hidden = !info.receipt;
  receipt.href = `v1/receipts/${encodeURIComponent(info.receipt)}`;
  receipt.onclick = (event) => handlers.showReceipt(event, info.receipt);
  copyButton(() => message.content, facts.querySelector('.copy')).hidden ||= !message.content || message.role === 'text';
  facts.querySelector('.regenerate').hidden = !last || Boolean(info.error) || message.role === 'text';
  facts.querySelector('.regenerate').onclick = () => handlers.again(conversation);
}

/** Brings the running answer up to date. */
export function paint(conversation = state.current) {
  painting = false;
  if (conversation !== state.current) return;
  const message = state.current.messages.at(-1);
  if (state.current.kind === 'text') {
    const field = $('text');
    const old = field.value;
    // What is appended moves neither the selection nor the place that the user reads.
    if (old && message.content.startsWith(old)) field.setRangeText(message.content.slice(old.length), old.length, old.length, 'preserve');
    else if (old !== message.content) field.value = message.content;
    if (state.current.run && state.atEnd) field.scrollTop = field.scrollHeight;
    showOutcome($('text-outcome').firstElementChild, state.current, message, true);
  } else if (message) {
    const body = bodies.get(message);
    render(body.firstElementChild, message.content);
    showOutcome(body.lastElementChild, state.current, message, true);
    if (state.atEnd) toEnd();
  }
  // A screen reader gets whole paragraphs.
  const { run: progress } = state.current;
  const whole = progress && message.content.lastIndexOf('\n\n');
  if (progress && whole > progress.said) {
    say(message.content.slice(progress.said, whole));
    progress.said = whole;
  }
}
export function requestPaint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => paint());
}

export function toEnd() {
  $('log').scrollTop = $('log').scrollHeight;
}

/** A run began or ended: its conversation, the list and the controls are brought up to date. `unsaid` is for screen readers. */
export function shown(conversation, unsaid) {
  showList();
  if (conversation !== state.current) return;
  const message = conversation.messages.at(-1);
  if (conversation.run) {
    conversation.retryAt = 0;
    state.atEnd = true;
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
  made.querySelector('.edit').onclick = () => handlers.edit(conversation, message, i, made);
  return made;
}

/** Shows a question again in place of `made`, where it was edited. */
export function questionAgain(conversation, message, i, made) {
  const back = question(conversation, message, i);
  bodies.set(message, back);
  made.replaceWith(back);
  return back;
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

/** Shows a conversation from its beginning to its end. */
export function show(conversation) {
  const changed = state.current !== conversation;
  state.current = conversation;
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
  if (changed) state.atEnd = true;
  paint();
  showList();
  if (state.models.length && !model) notice(`This server has no model that could continue this ${isText ? 'text' : 'conversation'}.`);
}
