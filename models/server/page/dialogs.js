// The settings, and an answer's receipt

import { $ } from './dom.js';
import { Failure, request } from './requests.js';
import { state } from './state.js';
import { saveSettings, settings } from './store.js';

export function openSettings() {
  $('system').value = state.current.system;
  $('settings').showModal();
}

/** Keeps a field of the settings, if its value can be used. */
export function changeSetting(field) {
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

export async function showReceipt(event, id) {
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
