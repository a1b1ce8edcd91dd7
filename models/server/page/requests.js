// Requests to the server

import { $ } from './dom.js';
import { perTab, text } from './store.js';

/** An error that is told to the user; `wait` is how many seconds the server asks to wait. */
export class Failure extends Error {
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
export async function request(path, body, signal) {
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
export async function* events(response) {
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
