// What the browser keeps: each conversation under a key of its own, and the settings. What is read back is checked, since
// other versions of this page, other tabs and people write there, too.

import { $, notice } from './dom.js';

export const PREFIX = 'bitnet.conversation.';
const SETTINGS = 'bitnet.settings';
export const SAMPLING = ['temperature', 'max_tokens', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'seed'];

/** The browser's storage, or null where it is switched off. */
function storage(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}
export const local = storage('localStorage');
export const perTab = storage('sessionStorage');

export const isObject = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);
export const text = (value) => (typeof value === 'string' ? value : '');
export const count = (value) => (Number.isFinite(value) && value >= 0 ? value : undefined);

/** What is known of an answer. Unknown facts are left out. */
export function readInfo(value) {
  const info = isObject(value) ? value : {};
  const read = { kernels: Array.isArray(info.kernels) ? info.kernels.filter((name) => typeof name === 'string') : [] };
  for (const key of ['model', 'end', 'error', 'receipt']) read[key] = text(info[key]);
  for (const key of ['seed', 'prompt', 'cached', 'tokens', 'speed', 'first', 'before']) read[key] = count(info[key]);
  return read;
}

/** A conversation from its stored JSON; null if the JSON describes no conversation. */
export function readConversation(id, json) {
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

export const settings = readSettings();

/** All conversations of the browser, and those of this page that the browser could not take. */
export const conversations = new Map();
export function readConversations() {
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
export function save(conversation) {
  const { id, kind, title, model, system, updated, messages } = conversation;
  if (conversations.has(id)) write(PREFIX + id, { kind, title, model, system, updated, messages });
}
export function forget({ id }) {
  conversations.delete(id);
  local?.removeItem(PREFIX + id);
}
export const saveSettings = () => write(SETTINGS, settings);

export function newConversation(kind) {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('');
  const messages = kind === 'text' ? [{ role: 'text', content: '', info: readInfo() }] : [];
  return { id, kind, title: '', model: settings.model, system: settings.system, updated: 0, messages };
}
export const isEmpty = (conversation) => !conversation.messages[0]?.content;
export function title(conversation) {
  const line = (conversation.messages[0]?.content ?? '').trim().split('\n')[0];
  return conversation.title || line.slice(0, 80) || 'New conversation';
}
