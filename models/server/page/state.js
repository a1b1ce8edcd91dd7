// What the page is showing, and the server's models

import { settings } from './store.js';

export const state = {
  models: [], // {id, chat, context, loaded}; chat and context are unknown until a model is loaded.
  current: null, // The conversation that is shown.
  atEnd: true, // The user reads its end, which is kept in sight while it grows.
};

export const kindOf = (model) => (model.chat === false ? 'text' : 'chat');
/** The model that continues a conversation: its own one, or the chosen one, or the first of its kind. */
export function modelOf(conversation) {
  const fit = state.models.filter((model) => kindOf(model) === conversation.kind);
  return fit.find(({ id }) => id === conversation.model) ?? fit.find(({ id }) => id === settings.model) ?? fit[0];
}
